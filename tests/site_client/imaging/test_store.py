"""The folder of a store."""

from __future__ import annotations

import os

from locum.site_client.imaging.store import exclusive


def test_a_new_store_is_its_owners_alone(tmp_path):
    before = os.umask(0o022)
    try:
        with exclusive(tmp_path / "site" / "store"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "site" / "store").stat().st_mode & 0o777 == 0o700


def test_access_rights_that_a_site_gave_a_store_stay(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store").chmod(0o750)
    with exclusive(tmp_path / "store"):
        pass
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o750
