"""How the rows of a file become events: which column means what, and rows to the bytes that the stream carries.

mapping.py    which column is the user, the type, the time, each attribute
tables.py     Parquet and CSV, ndjson.py NDJSON: a file as chunks, in constant memory
chunk.py      a stretch of a file: its events, and the rows that were refused before sending
values.py     the rules by which a value becomes text, number or time; columns.py the same for whole columns
encode.py     columns to serialized events
"""
