"""``make bench``: what ProtoCLIP costs beside CLIP, measured anew each time. No tests: ``tests/test_bench.py`` tests it."""

# Before torch: it sets how OpenMP's idle threads wait, for the trainings of open_clip's script too.
import protoclip_lab  # noqa: F401
