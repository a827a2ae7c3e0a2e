"""What a model card cites."""

SIMCSE = """
@inproceedings{gao-etal-2021-simcse,
    title={{SimCSE}: Simple Contrastive Learning of Sentence Embeddings},
    author={Gao, Tianyu and Yao, Xingcheng and Chen, Danqi},
    booktitle={EMNLP},
    year={2021},
    url={https://arxiv.org/abs/2104.08821}
}
"""
FOCAL = """
@inproceedings{hou-li-2023-improving,
    title={Improving Contrastive Learning of Sentence Embeddings with Focal-{InfoNCE}},
    author={Hou, Pengyue and Li, Xingyu},
    booktitle={Findings of EMNLP},
    year={2023},
    url={https://arxiv.org/abs/2310.06918}
}
"""
MATRYOSHKA = """
@inproceedings{kusupati-etal-2022-matryoshka,
    title={Matryoshka Representation Learning},
    author={Kusupati, Aditya and Bhatt, Gantavya and Rege, Aniket and Wallingford, Matthew and Sinha, Aditya and
            Ramanujan, Vivek and Howard-Snyder, William and Chen, Kaifeng and Kakade, Sham and Jain, Prateek and
            Farhadi, Ali},
    booktitle={NeurIPS},
    year={2022},
    url={https://arxiv.org/abs/2205.13147}
}
"""
GIST = """
@misc{solatorio2024gistembed,
    title={{GISTEmbed}: Guided In-sample Selection of Training Negatives for Text Embedding Fine-tuning},
    author={Solatorio, Aivin V.},
    year={2024},
    url={https://arxiv.org/abs/2402.16829}
}
"""
SUPCON = """
@inproceedings{khosla2020supervised,
    title={Supervised Contrastive Learning},
    author={Khosla, Prannay and Teterwak, Piotr and Wang, Chen and Sarna, Aaron and Tian, Yonglong and
            Isola, Phillip and Maschinot, Aaron and Liu, Ce and Krishnan, Dilip},
    booktitle={NeurIPS},
    year={2020},
    url={https://arxiv.org/abs/2004.11362}
}
"""
DISTILLCSE = """
@inproceedings{xu-etal-2023-distillcse,
    title={{DistillCSE}: Distilled Contrastive Learning for Sentence Embeddings},
    author={Xu, Jiahao and Shao, Wei and Chen, Lihui and Liu, Lemao},
    booktitle={Findings of EMNLP},
    year={2023},
    url={https://arxiv.org/abs/2310.13499}
}
"""
SPARSECSE = """
@misc{an2023sparse,
    title={Sparse Contrastive Learning of Sentence Embeddings},
    author={An, Ruize and Zhang, Chen and Song, Dawei},
    year={2023},
    url={https://arxiv.org/abs/2311.03881}
}
"""
GRADCACHE = """
@inproceedings{gao-etal-2021-scaling,
    title={Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup},
    author={Gao, Luyu and Zhang, Yunyi and Han, Jiawei and Callan, Jamie},
    booktitle={RepL4NLP},
    year={2021},
    url={https://arxiv.org/abs/2101.06983}
}
"""
