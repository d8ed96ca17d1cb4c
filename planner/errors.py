"""What planning can fail with. Each message says what was wrong, what was found, what to do."""


class PlannerError(Exception):
    """The root of this package's errors; its message is for whoever asked for the plan."""


class ShapeError(PlannerError):
    """A config.json that does not describe a model which can be planned."""


class HardwareError(PlannerError):
    """A device that is not known, or a calibration that cannot be used."""


class TraceError(PlannerError):
    """A trace that cannot be read, or that says too little."""


class NoPlanError(PlannerError):
    """No layout fits, or none keeps the limits."""
