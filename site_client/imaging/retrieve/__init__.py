"""Fetching what a query names from a PACS into the store, counted, resumable and de-identified on arrival."""
