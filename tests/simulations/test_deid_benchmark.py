"""The benchmark of cleaning measures what it says."""

from __future__ import annotations

import io

import pydicom

from locum.simulations.benchmarks.deid import measure, slice_of_ct


def test_the_slice_is_as_large_as_it_is_told_and_holds_a_patient():
    image = pydicom.dcmread(io.BytesIO(slice_of_ct()))
    assert image.pixel_array.shape == (512, 512)
    assert 90 <= sum(1 for _ in image.iterall()) <= 130
    assert str(image.PatientName) == "Kowalska^Zofia"


def test_every_number_stands_beside_its_floor():
    rows = {row.what: row for row in measure(turns=3)}
    assert rows["file / floor"].unit == "×"
    assert all(row.value > 0 for row in rows.values())
