"""Where a stage runs besides this process: what needs more than the ground floor knows."""
