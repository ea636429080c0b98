"""Goldcrest: raw speech and text to small, fast, served models.

The code lives in four top-level folders, importable here through symbolic links:

* `goldcrest.kernels`   -- the maths
* `goldcrest.cluster`   -- the machines
* `goldcrest.tasks`     -- the steps
* `goldcrest.pipelines` -- the chains
"""

__version__ = "0.1.0"
