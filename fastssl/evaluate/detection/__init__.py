"""Object detection and instance segmentation: a pre-trained backbone, fine-tuned under torchvision's Faster or Mask
R-CNN with a feature pyramid.
"""
