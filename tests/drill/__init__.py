"The whole drill: every fault, every kill, every machine and the long replays, each named and timed: `make drill`, `python -m tests.drill --only replays`."
