"""What the watch over the first averages says where a cause takes more than a line."""

TOGETHER = (
    "deslo: the parameters of all replicas are equal after {steps} steps, before any average: gradients still meet "
    "at every step, "
    "or all ranks see the same data, so nothing is saved. Attach what DDP(model) returned, not the module inside it "
    "nor before it "
    "is wrapped; take an optimizer that gathers nothing by itself; give every rank its own part of the data "
    "(DistributedSampler)"
)

WITHIN = (
    "deslo: rank(s) {ranks} hold other values than the first rank of their replica, whose values a checkpoint keeps; "
    "reduce the "
    "gradients of every parameter inside a replica, or make parts DTensors"
)
