"""How each kind of source is read: row by row, from any row on."""
