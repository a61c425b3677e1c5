"""Where rows come from: files of every kind, hub data sets, mixes; and what the columns mean."""
