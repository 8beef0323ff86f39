"""Pages for people: self-contained HTML made from documents, without scripts or outside files.

Pure: documents in, text out.
"""
