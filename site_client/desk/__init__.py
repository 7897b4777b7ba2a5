"""Pages for the site's own staff, on loopback only: quarantine, readiness, a viewer."""
