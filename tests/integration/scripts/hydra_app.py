"""A hydra project that knows nothing of lightning_eff; the precision is in its config."""

import hydra
from app import AppModel
from omegaconf import DictConfig


@hydra.main(version_base=None, config_path="conf", config_name="config")
def main(config: DictConfig) -> None:
    hydra.utils.instantiate(config.trainer).fit(AppModel())


if __name__ == "__main__":
    main()
