"""What does weak-to-strong matching do? A study on the toy's data; see README.md beside this."""
