"""Speed and memory of the library against the plain way: `python -m bench`."""
