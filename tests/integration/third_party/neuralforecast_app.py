"""A user's script for neuralforecast (on ``pytorch_lightning``): NHITS on the air passengers it ships.

It knows nothing of lightning_eff; the Trainer is made inside the library. Prints one line of JSON.
"""

import json

from neuralforecast import NeuralForecast
from neuralforecast.models import NHITS
from neuralforecast.utils import AirPassengersDF

HORIZON, STEPS = 12, 150

model = NHITS(
    h=HORIZON,
    input_size=24,
    max_steps=STEPS,
    random_seed=1,
    scaler_type="standard",
    accelerator="cpu",
    devices=1,
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
known, future = AirPassengersDF.iloc[:-HORIZON], AirPassengersDF.iloc[-HORIZON:]
forecaster = NeuralForecast(models=[model], freq="ME")
forecaster.fit(known)
forecast = forecaster.predict()["NHITS"].to_numpy()
after = float(abs(forecast - future["y"].to_numpy()).mean())
before = float(abs(future["y"] - known["y"].iloc[-1]).mean())  # the last value, carried forward
print(json.dumps({"steps": STEPS, "before": before, "after": after}), flush=True)
