"""Images, video and audio of a row: found, fetched and opened within limits."""
