"""What a recipe will cost: arithmetic on a model's shape, amounts of work, devices and memory. No torch, nothing from disk but YAML.

The cost model is one sum: seconds = Σ amount of work × seconds per unit. `amounts.py` counts the work (operations, bytes, passes),
`rates.py` has the seconds per unit: of this machine from runs that were measured (`fit.py`), of a GPU from its data sheet and
the efficiencies that others published (configs/plan/devices.yaml).
"""
