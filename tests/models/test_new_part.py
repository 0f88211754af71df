"""A new aggregator is a class and a line, a new backbone family a model class and a line; all else follows."""

from pathlib import Path

AGGREGATOR = '''class MedianAggregator(Aggregator):
    """The median over slices of each feature."""

    has_weights = False

    def pool(self, slices: Tensor, positions_mm: Tensor) -> tuple[Tensor, None]:
        return slices.median(dim=1).values, None


'''
BACKBONE = """
from transformers import AutoConfig, AutoModel, Dinov2Config, Dinov2Model


class OtherConfig(Dinov2Config):
    model_type = "other_vit"


class OtherModel(Dinov2Model):
    config_class = OtherConfig


AutoConfig.register("other_vit", OtherConfig)
AutoModel.register(OtherConfig, OtherModel)
"""
PROGRAM = """
import sys
import torch
import brainfound
from brainfound.errors import ModelError
from brainfound.models import BrainFoundConfig, BrainFoundForClassification, BrainFoundModel
from brainfound.models.other_vit import OtherConfig, OtherModel

folder = sys.argv[1]
assert brainfound.__file__.startswith(folder), brainfound.__file__
sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 24}
OtherModel(OtherConfig(**sizes)).eval().save_pretrained(f"{folder}/vit")
vit = OtherModel.from_pretrained(f"{folder}/vit").eval()
model = BrainFoundModel.from_backbone(f"{folder}/vit", aggregator="median")
pixels = torch.rand(2, 3, 3, 16, 24)
with torch.no_grad():
    output = model(pixels)
    library = vit((pixels[0] - 0.449) / 0.226).last_hidden_state[:, 0]
assert torch.equal(output.slice_embeddings[0], library)
assert torch.equal(output.volume_embedding, output.slice_embeddings.median(dim=1).values)
assert len(model.encoder.blocks) == 2 and model.config.backbone_config.model_type == "other_vit"
with torch.no_grad():
    tokens = model.encoder.transform([model.encoder.embed(pixels[0])])[0]
torch.testing.assert_close(tokens[:, 0], library)
model.save_pretrained(f"{folder}/saved")
loaded = BrainFoundForClassification.from_pretrained(f"{folder}/saved").eval()
with torch.no_grad():
    assert torch.equal(loaded(pixels).volume_embedding, model(pixels).volume_embedding)
for fields, known in (
    ({"aggregator": "mode"}, "transformer, median"),
    ({"backbone_config": {"model_type": "another"}}, "other_vit"),
):
    try:
        BrainFoundConfig(**fields)
    except ModelError as error:
        assert known in str(error), error
    else:
        raise AssertionError(fields)
"""


def insert(file: Path, before: str, text: str) -> None:
    content = file.read_text()
    assert content.count(before) == 1
    file.write_text(content.replace(before, text + before))


def test_a_class_and_a_line_are_all_that_a_new_part_needs(package_copy, run_on_copy, tmp_path):
    models = package_copy / "models"
    insert(models / "aggregators.py", "AGGREGATORS: dict", AGGREGATOR)
    insert(models / "aggregators.py", '}\n"""Name', '    "median": lambda config: MedianAggregator(),\n')
    (models / "other_vit.py").write_text(BACKBONE)
    insert(models / "backbones.py", "from brainfound.errors", "from brainfound.models.other_vit import OtherModel\n")
    insert(models / "backbones.py", '}\n"""Model type', '    "other_vit": Family(OtherModel),\n')
    done = run_on_copy(PROGRAM, tmp_path)
    assert done.returncode == 0, done.stderr
