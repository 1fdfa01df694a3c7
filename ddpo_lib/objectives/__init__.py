"""One module a method. A stranger changes a loss by reading one file.

Every objective answers the same questions, as functions under agreed names:

    Settings                                          a frozen dataclass, a docstring a field
    helpers(policy, settings, loop)                   who else is there? a network beside the policy
                                                      (a reference, a critic), or None
    credit(experience, settings, loop, helpers)       what is each decision worth? (N,) or (T, N)
    units(experience, settings, loop, generator)      what must the loss see together? for each
                                                      optimizer step (U, D, 2): U units of D
                                                      decisions (step, sample)
    loss(policy, experience, rows, credit, settings, helpers)
                                                      the loss of some of these units, (U,), and
                                                      what to log of them, name → (U,)

and, where it differs from DDPO:

    rollout(policy, settings, loop, helpers, seeds, context, iteration, generator)
                                                      who samples, and from where? a Trajectory; by
                                                      default the learner, from each seed's noise
    tend(settings, helpers, optimizer, iteration)     what is done between iterations?
    SCORES_DENOISED = True                            asks for `Experience.denoised`

`settings` is the objective's own `Settings`, `loop` the loop's `settings.Finetune`. `helpers` is
called first and refuses settings that do not go together. The weights of helpers that require a
gradient are learned with the policy's, at `helper_rate` times its rate if `Settings` has that, and
are in every checkpoint. `rollout` and `units` take random numbers from the generator alone. Rows
may have more than two columns; the second is the sample. `loss` sees the experience of its own
process, without groups and denoised rewards. The loop steps on the mean over units.
"""

import importlib.util
from types import ModuleType

FUNCTIONS = ("Settings", "helpers", "credit", "units", "loss")
PARTS = (*FUNCTIONS, "rollout", "tend", "SCORES_DENOISED")


def load(objective: str | ModuleType) -> ModuleType:
    """The module of an objective: one of this folder's by its name, "ddpo"; your own by its dotted
    name, "package.module"; or the module itself."""
    if isinstance(objective, str):
        ours = "." not in objective and importlib.util.find_spec(f"{__name__}.{objective}")
        try:
            objective = importlib.import_module(ours.name if ours else objective)
        except Exception as error:
            advice = "name one of ddpo_lib.objectives, 'ddpo', or an importable one of your own"
            said = f"cannot import the objective {objective!r}: {type(error).__name__}: {error}"
            raise ValueError(f"{said}; {advice}") from error
    if missing := [name for name in FUNCTIONS if not hasattr(objective, name)]:
        title = f"the objective {getattr(objective, '__name__', objective)!r}"
        raise ValueError(f"{title} lacks {missing}; what needs no change, import from DDPO's")
    return objective
