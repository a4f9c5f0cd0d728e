"""Nothing lost, nobody in: what happens to a run when the world misbehaves.

Each test asserts one of two outcomes: a clear error (it names value, file or row, and the remedy), an exit status and a last
good state that can be used; or counted in ``bad_rows.jsonl`` and gone on. Never a hang, a silent change of result or a broken
file. ``make test`` has the short form; ``make faults`` sets ALL_FAULTS=1, which takes all moments and cases.

=====================================================  ==========================================================================
fault                                                  tests (here, where no folder is named)
=====================================================  ==========================================================================
SIGKILL at 20 random moments, one and two processes    test_kills; at chosen places, SIGINT too: tests/test_resume, and of
                                                       processes that torchrun or the command line started: tests/test_processes
                                                       with the pairs of a stream gone too: tests/data/test_stream
disk full: checkpoint, metrics, teacher, report        test_disk
half-written or bit-flipped checkpoint                 test_checkpoints; a watcher: tests/evaluation/test_watch
two runs with one name at once                         test_checkpoints, tests/test_resume
a run folder of another config                         tests/test_runs, tests/test_resume
a config of an older version                           test_checkpoints
images: missing, empty, truncated, wrong type          test_data, tests/data/test_pairs; in evaluation: tests/evaluation/test_suite
images: colour modes, EXIF, animated, bomb             test_data (pixels), tests/data/test_pairs
paths outside the root, symlink loop, tar ``../``      test_data
tables                                                 test_data, tests/data/test_pairs
teachers: length, NaN, other table, truncated          tests/test_teachers; build killed half-way: there too
teachers: other dtype or shape                         test_data
pickles in place of weights, features, ``.npy``        test_checkpoints; authors' .pt: tests/test_encoders; CIFAR:
                                                       tests/data/test_known_sets; no call that could: tests/test_house
100 generated bad parameters                           test_settings; chosen ones: tests/test_config, tests/notebooks
NaN in features, loss and gradient                     test_numbers; tests/test_training, tests/test_clustering
K > N, episode or data set too small                   test_settings; tests/test_config, tests/test_training, tests/data/test_episodes
all features equal                                     test_numbers; tests/test_clustering, tests/test_teachers
half an hour of training                               soak.py, no test: ``make soak``; figures in reports/LOG.md
=====================================================  ==========================================================================
"""
