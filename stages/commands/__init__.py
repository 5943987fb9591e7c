"""The commands' options and words, a file each; what a command does is in the module it imports."""
