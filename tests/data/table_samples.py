"A few rows of known tables, under their real headers"

NIH = ('Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,'
       'OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],',
       '00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143,',
       '00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143,',
       '00000001_002.png,Cardiomegaly|Effusion,2,1,58,M,PA,2500,2048,0.168,0.168,',
       '00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,')
CHEXPERT_CLASSES = [
    'No Finding', 'Enlarged Cardiomediastinum', 'Cardiomegaly', 'Lung Opacity', 'Lung Lesion', 'Edema',
    'Consolidation', 'Pneumonia', 'Atelectasis', 'Pneumothorax', 'Pleural Effusion', 'Pleural Other', 'Fracture',
    'Support Devices',
]
CHEXPERT = (
    ','.join(['Path', 'Sex', 'Age', 'Frontal/Lateral', 'AP/PA', *CHEXPERT_CLASSES]),
    'CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,68,Frontal,AP,1.0,,,,,,,,,0.0,,,,1.0',
    'CheXpert-v1.0-small/train/patient00002/study2/view1_frontal.jpg,Female,87,Frontal,AP,,,-1.0,1.0,,-1.0,-1.0,,-1.0,,'
    '-1.0,,1.0,',
    'CheXpert-v1.0-small/train/patient00002/study1/view2_lateral.jpg,Female,83,Lateral,,,,,1.0,,,-1.0,,,,,,1.0,',
)
PLANT = ('image,labels', '800113bb65efe69e.jpg,healthy', '8002cb321f8bfcdf.jpg,scab frog_eye_leaf_spot complex',
         '80070f7fb5e2ccaa.jpg,scab', '80077517781fb94f.jpg,frog_eye_leaf_spot', '800cbf0ff87721f8.jpg,complex',
         '800edef467d27c15.jpg,healthy', '800f85dc5f407aef.jpg,powdery_mildew complex',
         '801d6dcd96e48ebc.jpg,powdery_mildew', '801f78399a44e7af.jpg,rust')
HPA = ('Id,Target', '00070df0-bbc3-11e8-b2bc-ac1f6b6435d0,16 0', '000a6c98-bb9b-11e8-b2b9-ac1f6b6435d0,7 1 2 0',
       '000a9596-bbc4-11e8-b2bc-ac1f6b6435d0,5', '000c99ba-bba4-11e8-b2b9-ac1f6b6435d0,1')
PLANET = ('image_name,tags', 'train_0,haze primary', 'train_1,agriculture clear primary water', 'train_2,clear primary',
          'train_3,clear primary', 'train_4,agriculture clear habitation primary road', 'train_5,haze primary water',
          'train_6,agriculture clear cultivation primary water', 'train_9,agriculture clear cultivation primary road',
          'train_24,cloudy')
OPEN_IMAGES = ('ImageID,Source,LabelName,Confidence', '000026e7ee790996,verification,/m/04hgtk,0',
               '000026e7ee790996,verification,/m/07j7r,1', '000026e7ee790996,crowdsource-verification,/m/01bqvp,1',
               '000062a39995e348,verification,/m/015p6,1', '000062a39995e348,verification,/m/05s2s,0')
DESCRIPTIONS = '/m/015p6,Bird', '/m/01bqvp,Sky', '/m/04hgtk,Head', '/m/05s2s,Plant', '/m/07j7r,Tree', '/m/0k4j,Car'
