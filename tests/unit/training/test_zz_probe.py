import time, torch
from training.loop import train, Hooks
from training.workers import Workers
from data.augment import AugmentConfig
PLAIN = AugmentConfig(mosaic_probability=0, hue_gain=0, saturation_gain=0, value_gain=0)
def test_p(tiny, tiny_spec):
    torch.set_num_threads(1)
    for kw in ({"learning_rate":0.1},{"learning_rate":0.02,"optimizer":"adamw"},{"learning_rate":0.3},{"learning_rate":0.1,"batch_size":2}):
        spec=tiny_spec(epochs=6, closing_epochs=0, augment=PLAIN, validate_every_epochs=6,**kw)
        out=[]
        t=time.time()
        state,val=train(spec,tiny.folder,Workers(0,1,torch.device("cpu")),Hooks(lambda m,s,e,save: out.append(m)))
        print("train",kw,time.time()-t, [round(o["train/loss"],3) for o in out], val.result.metrics["coco/AP50"])
