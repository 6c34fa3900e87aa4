"""What the operating system and torch give a process: memory, futexes, sockets, numerics."""
