"""What the processes of a pool say to one another, and the keys they prove themselves with."""
