"""The words that the built-in checkpoint knows; data only.

`KEYS` are the nouns that lists and copies are made of. Each is one token of the
built-in tokenizer, with and without its leading space.
"""

_TEXT = """
acorn actor album alley amber anchor angel ankle apple apron arch arena arm army arrow
artist ash atom attic aunt axe baby bacon badge bag baker ball band bank barn basin bat bath
beach bead beam bean bear beard beast beaver bed bee bell belt bench berry bike bird blade
boat body bolt bone bonus book boot border boss bottle bowl box boy brain branch brass bread
brick bridge broom brother brush bubble bucket buckle bulb bull bus bush butter button cabin
cable cage cake calf camel camera camp canal candle candy canoe canyon cap car card cargo
carpet carrot cart cat cave cedar chain chair chalk cherry chess chest chief child chin
cider city clay clock cloth cloud clover clown club coach coal coast coat cobra coin colony
color comb comet cook copper coral cork corn corner couch cow crab cradle crater crayon
cream creek crow crowd crown cube cup dance dawn deck deer desk dew dice dish doctor dog
doll door dove dragon drawer dream dress drum duck dust eagle ear earth echo eel egg elbow
elm eye face fan farm farmer father feast feather fence fern ferry fig film finger fire fish
flag flame flask flea flock floor flour flower fly foam fog forest fork fort fox frame frog
frost fruit fur garage gate gem ghost giant gift ginger girl glass globe glove glue goat
gold goose grain grape graph grass gravel guard guest gull gun hair hall hand harbor harp
hat hawk hay head heart hedge heel helmet hen herb hero hill hinge hive honey hood hook horn
horse hotel house ice idol igloo ink inn iron island ivory ivy jade jam jar jaw jelly jewel
judge juice jury key king kite kitten knee knife knight knot label lace lady lake lamb lamp
land lapel lark lawn leaf leather lemon lens level lever lily lime line lion lip liver lobby
lock log loop lord lotus lunch lung lynx maid maple map mask mast mat match meal medal melon
metal meter milk mill mine mint mist mitten model monk monkey moon moose moss moth mother
motor mouse mouth movie mud mule muscle music nail neck nest net niece night nose novel
nurse nut oak oar oasis oat ocean oil olive onion opera orbit orchard orchid organ otter
oven owl paddle page paint palace palm pan panda panel paper park parrot party pasta path
paw pea peach peak pear pearl pebble pedal pen pencil pepper person petal phone photo piano
pickle pie pig pigeon pillow pilot pin pine pipe pirate pizza planet plant plate plaza plum
pocket poem poet pole pond pony pool poppy porch port poster pot potato powder prism prize
pump pumpkin puppet puppy purse quail quartz queen quill quilt rabbit raft rail rain raisin
rake ranch rat raven razor reef ribbon rice rider ring river road robe robin robot rock
rocket roof room root rope rose ruby ruler saddle sail salad salmon salt sand scale scarf
school screen screw sea seal seat seed shadow shark sheep shelf shell ship shirt shoe shop
shore shovel shrub sign silk silver singer sister skate skirt sky sled sleeve slope smoke
snail snow soap sock sofa soil song soup spark spear spice spider spoon sport spring square
squid stable stair stamp star steam steel stem stick stone stool store storm stove straw
stream street string sugar suit summer sun swan sword syrup table tail tailor tank tape
teacher tea team temple tent thorn thread throne thumb ticket tiger tile timber tin toad
toast toe tomato tongue tooth torch tower town toy track tractor train tray tree truck tub
tube tulip tuna tunnel turkey turtle twig uncle valley van vase vault veil velvet vessel
vine voice wagon waist wall walnut wand water wave wax well whale wheat wheel wick widow
wife willow wind window wine wing winter witch woman wood wool worm wrist yard yarn year
zebra zoo
"""

KEYS: tuple[str, ...] = tuple(_TEXT.split())

_TEMPLATE_TEXT = """
the code of is what repeat user assistant system you are a small test model hello hi
thank welcome who i only know codes copies and sums please can do
"""

TEMPLATE_WORDS: tuple[str, ...] = tuple(_TEMPLATE_TEXT.split())
