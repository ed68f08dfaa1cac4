"""A driving dataset of a few boxes on a road, with exact maps or a LiDAR cloud, and a tiny GroundingDINO."""

from pathlib import Path

import numpy as np

from common.labelers import Maps, write_maps, write_semantic
from common.nuscenes import CAMERAS, FREE, LIDARSEG_TO_OCC3D, Boxes

YAW = (0, -55, -110, 180, 110, 55)  # [deg] of the six cameras


class FakeWorld:
    """The part of NuScenesOccupancy that labelers use: a road with kerbs, walls and boxes, ray-cast
    exactly."""

    def __init__(self, root, scenes=1, frames=2, shape=(40, 72), step=0.0, boxes=12):
        self.root, self.image_shape, self.image_size, self.step = Path(root), shape, shape, step
        self.scene_names = [f"scene-{s:04d}" for s in range(scenes) for _ in range(frames)]
        self.tokens = [f"{s:03d}{k:03d}" for s in range(scenes) for k in range(frames)]
        self.number = [(s, k) for s in range(scenes) for k in range(frames)]
        self.box_count = boxes

    def __len__(self):
        return len(self.tokens)

    def camera_files(self, i):
        return [f"samples/{camera}/{self.tokens[i]}__{camera}.jpg" for camera in CAMERAS]

    def calibration(self, i):
        h, w = self.image_shape
        K, T = np.zeros((6, 3, 3), np.float32), np.zeros((6, 4, 4), np.float32)
        for n, yaw in enumerate(np.radians(YAW)):
            f = w / 2 / np.tan(np.radians(55 if n == 3 else 35))
            K[n] = [[f, 0, w / 2], [0, f, h / 2], [0, 0, 1]]
            c, s = np.cos(yaw), np.sin(yaw)
            T[n] = [[s, 0, c, c + 0.5], [-c, 0, s, s / 2], [0, -1, 0, 1.6], [0, 0, 0, 1]]
        scene, k = self.number[i]
        T_global_ego = np.eye(4)
        T_global_ego[:2, 3] = 600 + self.step * k + 1000 * scene, 1200
        return K, T, T_global_ego

    def exact(self, i):
        """-> semantic, depth, instance (6, h, w)."""
        K, T, _ = self.calibration(i)
        (h, w), (scene, k) = self.image_shape, self.number[i]
        rng = np.random.default_rng(scene)
        u, v = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
        uv1 = np.stack([u, v, np.ones_like(u)], -1)
        ray = np.einsum("nij,njk,hwk->nhwi", T[:, :3, :3], np.linalg.inv(K.astype(float)), uv1)
        origin = (T[:, :3, 3] + [self.step * k, 0, 0])[:, None, None]
        semantic = np.full((6, h, w), FREE, np.uint8)
        depth, instance = np.full((6, h, w), np.inf), np.zeros((6, h, w), np.uint16)

        def draw(t, label, where, one=0):
            where = where & (t > 0.1) & (t < depth)
            depth[where], instance[where] = t[where], one
            semantic[where] = np.broadcast_to(label, where.shape)[where]

        with np.errstate(all="ignore"):
            t = -origin[..., 2] / ray[..., 2]
            y = np.abs(origin[..., 1] + t * ray[..., 1])
            draw(t, np.select([y < 7, y < 7.8, y < 11], [11, 12, 13], 14), t < 150)
            for wall in (-18, 18):
                t = (wall - origin[..., 1]) / ray[..., 1]
                x, z = origin[..., 0] + t * ray[..., 0], origin[..., 2] + t * ray[..., 2]
                draw(t, np.where(np.sin(x / 15) > 0, 15, 16), (z > 0) & (z < 9))
            for b in range(self.box_count):
                label = (4, 10, 4, 3, 2, 6, 7, 8, 1, 9, 5)[b % 11]
                size = np.array((0.7, 0.7, 1.7) if label in (2, 6, 7, 8) else (5, 2.2, 2))
                place = np.array([rng.uniform(-30, 30), rng.choice([-1, 1]) * rng.uniform(4, 12), 0])
                low = place - size * [0.5, 0.5, 0]
                a, c = (low - origin) / ray, (low + size - origin) / ray
                enter, leave = np.minimum(a, c).max(-1), np.maximum(a, c).min(-1)
                draw(enter, label, enter < leave, 1 + 100 * scene + b)
        return semantic, np.where(np.isfinite(depth), depth, 0).astype(np.float32), instance

    def write(self):
        for i in range(len(self)):
            semantic, depth, instance = self.exact(i)
            write_maps(self.root / "exact", self.camera_files(i), Maps(semantic, depth))
            write_semantic(self.root / "exact", self.camera_files(i), instance, "instance")
        return self


class FakeLidar(FakeWorld):
    """A tilted ground with kerbs, a car and a bicycle beside it, a wall, returns on the ego's own body."""

    slope = (0.02, -0.03, 0.1)

    def __init__(self, root, lidarseg=False):
        super().__init__(root, shape=(180, 320))
        rng = np.random.default_rng(0)
        xy = rng.uniform(-30, 30, (6000, 2))
        ground = np.column_stack([xy, xy @ self.slope[:2] + self.slope[2] + rng.normal(0, 0.03, 6000)])
        kerb = np.column_stack([rng.uniform(-30, 30, 500), np.full(500, 12.0), np.full(500, 0)])
        kerb[:, 2] = kerb[:, :2] @ self.slope[:2] + self.slope[2] + rng.uniform(0.5, 3, 500)
        car = np.array([10, 3, 1.0]) + rng.uniform(-0.5, 0.5, (200, 3)) * [4.5, 1.9, 1.6]
        bicycle = np.array([10, 3.6, 0.9]) + rng.uniform(-0.5, 0.5, (50, 3)) * [1.7, 0.6, 1.3]  # some in the car's box
        ego = np.array([1.0, 0, 1.0]) + rng.uniform(-0.4, 0.4, (100, 3))
        self.parts = {"ground": ground, "kerb": kerb, "car": car, "bicycle": bicycle, "ego": ego}
        xyz = np.concatenate(list(self.parts.values()))
        self.cloud = np.column_stack([xyz, np.zeros((len(xyz), 2))]).astype(np.float32)
        self.segmented = lidarseg

    def points(self, i):
        return self.cloud

    def lidarseg(self, i, raw=False):
        if not self.segmented:
            return None
        label = np.repeat([24, 28, 17, 14, 31], [len(p) for p in self.parts.values()]).astype(np.uint8)
        label[:10] = 0  # noise
        return label if raw else LIDARSEG_TO_OCC3D[label]

    def boxes(self, i):
        T = np.broadcast_to(np.eye(4), (2, 4, 4)).copy()
        T[:, :3, 3] = [10, 3, 1.0], [10, 3.6, 0.9]
        size = np.array([[1.9, 4.5, 1.6], [0.6, 1.7, 1.3]])  # width, length, height
        none = np.zeros(2)
        return Boxes(T[:, :3, 3], size, none, None, ["vehicle.car", "vehicle.bicycle"], np.array([4, 2], np.uint8),
                     [], none, none, none, [], T)  # fmt: skip


def save_grounding_dino(root: Path, words: set[str]) -> None:
    """A random GroundingDINO that knows these words, in root/dino as from_pretrained reads it."""
    import transformers as t
    from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "?", *sorted(words)]
    (root / "vocab.txt").write_text("\n".join(vocabulary))
    swin = t.SwinConfig(image_size=128, embed_dim=12, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                        out_indices=[2, 3, 4])
    bert = t.BertConfig(vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, max_position_embeddings=64)
    t.GroundingDinoForObjectDetection(t.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, num_queries=20, encoder_layers=1, decoder_layers=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2,
        max_text_len=64, disable_custom_kernels=True)).save_pretrained(root / "dino")
    size = {"shortest_edge": 128, "longest_edge": 256}  # at least 128 px: the deepest level must not be 1x1
    tokenizer = t.BertTokenizer(str(root / "vocab.txt"))
    t.GroundingDinoProcessor(GroundingDinoImageProcessorPil(size=size), tokenizer).save_pretrained(root / "dino")
