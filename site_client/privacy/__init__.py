"""The privacy of a site's patients: noise, sampling, accounting, and the ledger of what was spent."""
