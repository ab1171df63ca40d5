"""How models write calls of functions in their answers: a file for each format, told by the chat template."""
