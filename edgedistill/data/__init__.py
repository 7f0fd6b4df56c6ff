"""Images with labels to train on and to measure against; numpy only."""

from edgedistill.data.dataset import ImageDataset as ImageDataset
from edgedistill.data.dataset import Images as Images
from edgedistill.data.dataset import open_dataset as open_dataset
from edgedistill.data.digits import load_digits as load_digits
