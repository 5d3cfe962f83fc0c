"""How the rows of a file become events: which column means what, and rows to the bytes that the stream carries."""
