"""Static embeddings: a table with a row a token, whose mean over a text's tokens is the text's embedding."""
