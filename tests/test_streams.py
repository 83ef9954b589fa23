"""What commands do not print."""

import sys
import types

import pytest

from transxssm_jax import streams


@pytest.fixture
def seen(monkeypatch):
    """Errors that reached the hook which was there before."""
    errors = []
    monkeypatch.setattr(sys, 'unraisablehook', lambda unraisable: errors.append(unraisable.exc_value))
    streams.hide_late_callbacks()
    return errors


def test_a_call_to_a_closed_event_loop_is_not_printed_and_any_other_error_is(seen):
    other = [RuntimeError('another'), ValueError('Event loop is closed')]
    for error in (RuntimeError('Event loop is closed'), *other):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, exc_type=type(error), err_msg=None, object=None))
    assert seen == other
