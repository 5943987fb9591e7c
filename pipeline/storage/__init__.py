"""Files, local or behind a URL of fsspec.

Writes are atomic, reads are bounded in size, and remote files are read through a local cache.
Folder locks keep two commands out of one folder. This room does not know what the files hold.
Begin with `files` (writing and hashing) and `remote` (local paths and URLs).
"""
