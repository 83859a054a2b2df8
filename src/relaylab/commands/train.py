"""`relaylab train`: train a recipe with one seed, or resume a run."""

from relaylab.errors import INTERRUPTED, LabError
from relaylab.train.options import TrainOptions


def main(options: TrainOptions) -> int:
    """Train a recipe, or resume a run. Under torchrun, only the first process that fails raises an error."""
    from relaylab.train import requests, torchrun

    if torchrun.restart_count() and torchrun.noted_failure() is not None:
        return 0  # the failure would repeat; the launching command reports it
    try:
        request = requests.resolve(options, {*options.given, "recipe"} if options.given else None)
        if request.options.devices > 1 and not torchrun.is_launched():
            from relaylab.train import engine

            return engine.launch(request.options, requests.arguments_of(options))
        from relaylab.train import session

        outcome = session.train(request)
    except LabError as error:
        if torchrun.note_failure(error):
            raise
        return error.exit_code
    return 0 if outcome.finished or torchrun.is_launched() else INTERRUPTED
