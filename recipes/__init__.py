"""Methods: each wires the stages of a run in order, readable on a screen or two."""
