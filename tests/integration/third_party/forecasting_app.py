"""A user's script for pytorch-forecasting (on ``lightning.pytorch``): a temporal fusion transformer on made-up series.

It knows nothing of lightning_eff. Prints one line of JSON.
"""

import json

import lightning.pytorch as pl
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet
from pytorch_forecasting.data.encoders import GroupNormalizer
from pytorch_forecasting.data.examples import generate_ar_data
from pytorch_forecasting.metrics import QuantileLoss

ENCODER, DECODER, EPOCHS = 24, 6, 6

pl.seed_everything(1)
data = generate_ar_data(seasonality=10.0, timesteps=120, n_series=20, seed=1)
data["series"] = data["series"].astype(str)
training = TimeSeriesDataSet(
    data[data.time_idx < 100],
    time_idx="time_idx",
    target="value",
    group_ids=["series"],
    static_categoricals=["series"],
    time_varying_unknown_reals=["value"],
    time_varying_known_reals=["time_idx"],
    max_encoder_length=ENCODER,
    max_prediction_length=DECODER,
    target_normalizer=GroupNormalizer(groups=["series"]),
)
validation = TimeSeriesDataSet.from_dataset(training, data, min_prediction_idx=100)
model = TemporalFusionTransformer.from_dataset(
    training, learning_rate=0.02, hidden_size=16, attention_head_size=2, loss=QuantileLoss(), optimizer="adam"
)
trainer = pl.Trainer(
    accelerator="cpu",
    max_epochs=EPOCHS,
    limit_train_batches=20,
    gradient_clip_val=0.1,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
)
before = trainer.validate(model, validation.to_dataloader(train=False, batch_size=64), verbose=False)[0]["val_loss"]
trainer.fit(
    model,
    training.to_dataloader(train=True, batch_size=32),
    validation.to_dataloader(train=False, batch_size=64),
)
after = float(trainer.callback_metrics["val_loss"])
print(json.dumps({"steps": trainer.global_step, "before": before, "after": after}), flush=True)
