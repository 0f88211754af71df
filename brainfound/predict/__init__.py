"""From scans to answers: predictors, predictions in native space, challenge containers.

The package is also a verb: ``brainfound.predict(model, inputs, …)`` (see `brainfound.callable_room`).
"""

from brainfound.callable_room import make_callable

# Imported when it is called: the function needs torch, and the command line must answer without it.
make_callable(__name__, "brainfound.predict.cohort_prediction:predict")
