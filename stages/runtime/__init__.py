"""What a process needs of the operating system, below everything else: imports nothing of this project."""
