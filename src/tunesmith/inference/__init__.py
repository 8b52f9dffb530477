"""A model's answers to a file of rows, a line a row, however large the file and often interrupted."""
