"""Is ``__main__`` while a user's script runs; see :mod:`lightning_eff.integration.script` for why."""

from lightning_eff.integration.script import prepare

if __name__ in ("__main__", "__mp_main__"):
    exec(prepare(globals()), globals())  # noqa: S102 - running the user's script is what this is for
