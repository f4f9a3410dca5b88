"""What a recipe will cost: arithmetic on shapes of models, amounts of work, devices and memory. No torch.

The cost model is one sum: seconds = Σ amount of work × seconds per unit. `amounts.py` counts the work (operations, bytes,
passes); `devices.py` has the seconds per unit: of this machine from runs that were measured (`fit.py`), of a GPU from its data
sheet and the efficiencies that others published (configs/plan/devices.yaml).
"""
