"""The front: run, resume, plan, start, evaluate, predict, verify.

Each function reads as the stages that it goes through; the work is done in the packages below.

training       run, resume and plan
planner        the ways to run a job predicted, the best timed, one chosen
host_planner   which hosts take part, and with how many workers
tuning         settings that change numbers, tried for what they would save
core_trials    what a step takes with so many workers, timed in a fork
background     start: a run in the background, and the handle that steers it
stored_model   the newest good checkpoint of a run, loaded on one host or several
evaluation     evaluate: the held-out metrics of a stored model
prediction     predict: a row for each record of a file
verification   verify: steps replayed and compared with the ledger
"""
