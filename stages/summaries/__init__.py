"""What the commands say when they are done, a file a subject."""
