"""What is found out about a graph; nothing in it changes but its annotations."""
