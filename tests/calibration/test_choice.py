"""Names and options are judged before the model is."""

from __future__ import annotations

import pytest
from torch import nn

from calipers import calibrate
from calipers.calibration import attach
from calipers.calibration.plan import ObserverChoice
from calipers.errors import UnknownObserverError


def test_a_misspelt_option_is_told_of_a_model_that_is_quantized_already():
    """As in the tutorial, where one model is quantized in several ways."""
    model = nn.Sequential(nn.Linear(128, 8))
    calibrate(model, "W4A16")
    for call in (
        lambda: calibrate(model, "W4A16", "mse", observer_options={"max_shrink": 0.3}),
        lambda: attach(model, "W4A16", observer="mse", observer_options={"max_shrink": 0.3}),
    ):
        with pytest.raises(ValueError, match=r"'max_shrink' \(did you mean 'maxshrink'\?\)"):
            call()


def test_what_is_wrong_without_a_model():
    ObserverChoice("Imatrix-MSE", "static_minmax", {"norm": 2.0}).check()
    ObserverChoice(options={"any": 1}).check()  # of which observer, the scheme says
    for wrong in (ObserverChoice("optimall"), ObserverChoice(activation="optimall")):
        with pytest.raises(UnknownObserverError, match="Did you mean 'optimal'"):
            wrong.check()
    with pytest.raises(ValueError, match="unknown option 'grd'"):
        ObserverChoice("optimal", options={"grd": 1}).check()
