"""Where records are kept: the SQLite store, files of records, and a campaign's journal."""
