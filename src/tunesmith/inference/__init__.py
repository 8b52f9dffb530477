"""A model's answers to a file of rows, one line a row, however large the file and however often it is interrupted."""
