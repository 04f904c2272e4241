"""Practical goals, twin sentences and twin questions of the pocket set, written for this project.

Everything here comes in pairs: two goals with two solutions, each wrong for the other goal; a
sentence whose blank changes with its last words; a question that turns from yes to no with one
word. A pair is one fact, so both halves land on the same side of the split.
"""

from __future__ import annotations

# Two goals a cluster. Each solution reaches its own goal and not the other one.
GOALS = """
= butter
soften a stick of cold butter
> Leave it on the kitchen counter for an hour.
firm up butter that has become too soft
> Put it in the refrigerator for an hour.

= jar
open a jar with a stuck metal lid
> Hold the lid under hot water, then twist it to the left.
close a jar so that nothing leaks
> Put the lid on straight and twist it to the right.

= onion
chop an onion without many tears
> Chill it first and use a very sharp knife.
turn chopped onion sweet and brown
> Stir it in a buttered pan over low heat.

= eggs
cook an egg so that it can be peeled whole
> Boil it in its shell for ten minutes.
cook an egg sunny side up
> Crack it into a hot pan and do not turn it.

= apple
keep apple slices from turning brown
> Sprinkle them with lemon juice.
make apple sauce from apple slices
> Simmer them with a little water, then mash them.

= rice
cook plain rice
> Simmer it in a covered pot with water until soft.
dry a wet phone overnight
> Switch it off and leave it somewhere warm and airy.

= pasta
get cooked spaghetti out of its water
> Pour everything through a colander.
make raw spaghetti soft
> Drop it into boiling, salted water.

= wine
get red wine out of a white tablecloth
> Blot it at once and cover it with salt.
get candle wax off a tablecloth
> Let it harden, then scrape it off with a dull knife.

= gum
remove chewing gum from a rug
> Rub it with an ice cube and break it off.
remove dust from a rug
> Run a vacuum cleaner over it.

= window
clean a greasy window
> Wipe it with vinegar water and a lint-free cloth.
block the draft from a leaky window
> Press foam tape along the frame.

= mirror
clear a mirror that has fogged up after a shower
> Aim a hair dryer at the glass.
keep a mirror from breaking on moving day
> Wrap the glass in a thick blanket.

= squeak
silence a squeaky door hinge
> Put a few drops of oil on it.
stop a door from slamming in the wind
> Push a wedge under it.

= nail
pull a bent nail out of a board
> Hook the claw of a hammer under its head.
drive a nail straight into a board
> Hit its head with the flat face of a hammer.

= screw
fasten a screw in a shelf
> Turn it clockwise with a screwdriver.
take a screw out of a shelf
> Turn it counterclockwise with a screwdriver.

= board
make a rough board smooth
> Rub it with sandpaper along the grain.
shorten a board by a foot
> Mark a line and cut along it with a saw.

= paint
save a half-used can of paint for next year
> Hammer the lid on tightly and store it indoors.
use up paint that has become lumpy
> Strain it through an old stocking first.

= brush
clean a brush full of water-based paint
> Wash it with soap and warm water right away.
keep a wet paintbrush from drying over lunch
> Wrap it tightly in plastic film.

= plant
save a plant that droops in dry soil
> Give it a good drink of water.
save a plant that is standing in a puddle
> Pour off the extra water and let the soil dry.

= seeds
keep birds away from newly sown seeds
> Stretch a net over the bed.
invite birds to the garden
> Hang up a feeder with sunflower seeds.

= weeds
get rid of a dandelion for good
> Dig it out with the whole root.
give a friend a fresh bunch of daisies
> Cut the stems and put them in water.

= flowers
make cut flowers last longer
> Trim the stems and change the water every day.
make dried flowers for a picture frame
> Press them between the pages of a heavy book.

= lawn
make a dry brown lawn green again
> Run the sprinkler early in the morning.
take fallen leaves off the lawn
> Pull a rake across the grass.

= ants
stop ants from coming into the kitchen
> Wipe up crumbs and seal the crack they use.
watch ants close up with a child
> Lay some crumbs near their nest outdoors.

= mosquito
sleep without mosquito bites
> Hang a fine net around the bed.
stop mosquitoes from breeding in the yard
> Empty every bucket of standing water.

= shoes
dry wet leather shoes
> Stuff them with newspaper and leave them overnight.
make leather shoes shine
> Rub in some polish and buff it with a cloth.

= laces
keep shoelaces from coming undone
> Tie a double knot.
get muddy shoelaces clean
> Take them out and soak them in soapy water.

= shirt
smooth a wrinkled shirt without an iron
> Hang it in the bathroom during a hot shower.
whiten a shirt that has turned gray
> Soak it in water with bleach.

= sweater
wash a wool sweater without shrinking it
> Use cool water and wool soap.
pack a thick sweater in a small bag
> Roll it tightly and squeeze out the air.

= zipper
free a stuck zipper
> Rub it with the tip of a pencil.
close a coat whose zipper is broken
> Fasten it with safety pins.

= button
keep a loose button from falling off
> Stitch it on again with strong thread.
undo the top button of a tight collar
> Push it back through the slit.

= ink
get fresh ink off the skin
> Scrub with soap and water.
get ink to write on paper
> Pull the cap off the pen.

= splinter
take a splinter out of a finger
> Grip its end with clean tweezers and pull.
stop a finger from bleeding
> Press a clean pad on it and hold it up.

= burn
cool a small burn on the hand
> Hold it under cool running water.
avoid a burn when taking out a tray
> Put on a pair of oven mitts.

= nose
stop a nosebleed
> Lean forward and pinch the soft part.
clear a stuffy nose
> Breathe in the steam from a bowl of hot water.

= hiccups
get rid of hiccups
> Hold your breath for a short while.
get rid of bad breath
> Brush your teeth and your tongue.

= throat
soothe a sore throat
> Sip warm tea with honey.
soothe tired feet
> Soak them in a tub of warm water.

= sleep
fall asleep more easily
> Dim the lamps and put the phone away.
stay awake on a long night shift
> Turn on bright lamps and have some coffee.

= cold
stay warm on a winter hike
> Wear several layers and a hat.
stay cool on a summer hike
> Wear a thin shirt and walk in the shade.

= sunburn
avoid sunburn at the pool
> Put on sunscreen every two hours.
avoid slipping at the pool
> Walk slowly on the wet tiles.

= rain
keep a backpack dry in the rain
> Pull a waterproof cover over it.
dry a rain-soaked backpack
> Empty it and hang it over a heater.

= campfire
make a campfire burn hotter
> Add dry wood and blow on the embers.
put out a campfire safely
> Drown it with water and stir the ashes.

= panfire
put out burning oil in a pan
> Slide a lid over it and turn off the heat.
put out a glowing log in a fire pit
> Pour a bucket of water on it.

= north
find south at noon in Europe
> Turn to face the sun.
find out at night which way is north
> Look for the North Star.

= mapread
find the nearest town on a walk without a phone signal
> Look at a paper map.
find out how far you walked today
> Read the number on a step counter.

= fish
catch a fish from a pier
> Lower a hook with a worm into the water.
clean a fish for dinner
> Scrape off the scales and take out the guts.

= fishtank
give fish in a tank enough air
> Let a pump bubble through the water.
keep green slime off the glass of a tank
> Wipe it with a soft scraper every week.

= dog
teach a dog to sit
> Give it a treat each time it obeys.
keep a dog from running into traffic
> Clip a leash to its collar.

= cat
keep a cat from scratching the sofa
> Offer it a post wrapped in rope.
get a cat to the vet
> Put it in a carrier with a door.

= hair
get tangles out of long hair
> Comb it gently from the ends upward.
keep long hair out of your eyes
> Tie it back with a band.

= bike
make a bicycle stop
> Squeeze the brake levers.
make a bicycle easier to pedal uphill
> Shift to a lower gear.

= chain
stop a bicycle chain from squeaking
> Wipe it and add a little oil.
stop a bicycle from being stolen
> Lock the frame to a rack.

= carice
clear ice off a windshield
> Use a plastic scraper.
keep ice from forming on a windshield overnight
> Cover it with a blanket in the evening.

= carbattery
start a car with a dead battery
> Connect it to another car with jumper cables.
start a car with an empty tank
> Pour in some fuel from a can.

= stuckcar
free a car that is stuck in sand
> Put boards under the wheels and drive off slowly.
keep a parked car from rolling downhill
> Pull the hand brake.

= heavy
move a heavy sofa across a wooden floor
> Slip felt pads under its legs.
lift a heavy box without hurting your back
> Bend your knees and keep it close to you.

= book
remember where you stopped reading
> Lay a bookmark between the pages.
keep a book from falling over on a shelf
> Place a bookend beside it.

= glue
mend a broken cup
> Put strong glue on the edges and press them together.
mend a torn page
> Lay clear tape over the tear.

= pencil
fix a pencil with a broken tip
> Turn it in a sharpener.
remove a wrong pencil line
> Rub it with an eraser.

= circle
draw a neat circle
> Trace around the rim of a cup.
draw a neat straight line
> Run the pencil along a ruler.

= balloon
fill a balloon so that it rises to the ceiling
> Use helium from a tank.
fill a balloon for a water fight
> Fit it over the tap.

= ice
make ice cubes
> Fill a tray with water and freeze it.
get ice cubes out of a tray
> Twist it, or run warm water over its bottom.

= drink
cool a can of soda quickly
> Bury it in ice water for some minutes.
keep soup hot until noon
> Pour it into an insulated flask.

= bread
freshen up a stale roll
> Dampen it and heat it in the oven for a moment.
make bread crumbs from a stale roll
> Rub it over a grater.

= toast
make toast
> Put slices of bread in the toaster and push the lever.
stop toast from burning
> Set the dial to a lower number.

= salt
rescue soup that is too salty
> Add more water and potatoes.
rescue soup that is too bland
> Add a pinch of salt and some herbs.

= milk
find out whether milk has gone bad
> Smell it and look for lumps.
keep milk from boiling over
> Watch the pot and stir it on low heat.

= banana
ripen a green banana
> Keep it in a paper bag with an apple.
use a banana that is too soft to eat
> Mash it and bake it into bread.

= honey
make hard, grainy honey runny again
> Stand the jar in warm water.
measure honey without a sticky spoon
> Wipe the spoon with oil first.

= chocolate
melt chocolate without burning it
> Set a bowl of it over hot water.
keep chocolate firm on a hot trip
> Carry it in a cooler bag.

= pan
loosen food burned onto a pot
> Soak it overnight with water and baking soda.
keep pancakes from sticking to a pan
> Grease it well before you pour the batter.

= sink
clear a clogged sink
> Work a plunger up and down over the drain.
keep a ring from falling down the drain
> Put in the stopper before you wash.

= toilet
get rid of a bad smell in the refrigerator
> Place an open box of baking soda inside.
get rid of a bad smell in a room
> Open the windows wide.

= trash
keep a trash bag from ripping
> Take it out before it is too full.
pick up pieces of broken glass
> Use a brush and dustpan.

= lamp
replace a burned-out light bulb
> Switch off the lamp and unscrew it.
make a dim room brighter by day
> Draw back the curtains.

= wobble
stop a table from wobbling
> Fold some paper and slip it under the short leg.
protect a table from hot pots
> Lay a cork mat on it.

= cable
tell apart the cables behind a desk
> Stick a label on each of them.
keep cables from tangling in a bag
> Coil each one and tie it up.

= password
make a password hard to guess
> Use many random letters and numbers.
remember a long password
> Turn it into a silly sentence.

= phonebattery
make a phone battery last through the day
> Lower the brightness of the screen.
get a frozen phone to work again
> Turn it off and on.

= crowd
keep a small child safe in a crowd
> Hold hands all the time.
see a parade over the heads of a crowd
> Step up on a sturdy bench.

= queue
save time at a popular museum
> Book the tickets online.
save money on a long train ride
> Buy the fare months ahead.

= snow
walk on deep, soft snow
> Strap wide snowshoes to your boots.
walk on smooth ice
> Take short, flat steps and wear spikes.

= swim
float on your back in a lake
> Fill your lungs and stretch out flat.
dive down to the bottom of a pool
> Kick hard with your head pointing down.

= tentpeg
keep a tent dry inside
> Leave a gap between the outer and inner sheets.
keep a tent from blowing away
> Drive the pegs deep into the ground.

= whisk
whip cream
> Beat it cold with a whisk.
separate an egg
> Tip the yolk back and forth between the shell halves.

= cake
find out whether a cake is baked through
> Stick a toothpick in the center.
get a cake out of its pan in one piece
> Loosen the rim with a knife and turn it over.
"""

# kind | sentence with [ending that points to the first | ending that points to the second].
# Kind "names": {A} and {B} are people. Otherwise the kind names the two things, as "x/y".
TWINS = """
names | {A} made too much soup and {B} had none, so _ [shared a bowl of it|got a bowl of it].
names | {A} paid back the money to {B}, because _ [had borrowed it|had lent it] last week.
names | {A} asked {B} for the way to the station, because _ [was lost|knew the town well].
names | {A} could not hear {B} over the music, so _ [leaned in to listen|spoke up].
names | {A} passed the ball to {B} because _ [was surrounded|stood free] near the goal.
names | {A} taught {B} to swim because _ [was a good swimmer|was afraid of deep water].
names | {A} hired {B} to fix the roof because _ [needed a carpenter|was a carpenter].
names | {A} beat {B} at chess, and _ [grinned at the win|asked for a second chance].
names | {A} carried the bags for {B} because _ [had strong arms|had a broken arm].
names | {A} called the office of Doctor {B} because _ [felt ill|could treat the illness].
names | {A} apologized to {B}, because _ [had told a lie|had been lied to].
names | {A} was taller than {B}, so _ [had to duck under the beam|fit under the beam with ease].
names | {A} sold the old boat to {B}, because _ [no longer sailed|wanted to learn sailing].
names | {A} baked a cake for {B}, so _ [was busy in the kitchen|got a sweet surprise].
names | {A} photographed {B} by the fountain, so _ [held the camera|smiled for the picture].
names | {A} woke {B} at noon, because _ [was already up|was still asleep].
names | {A} followed {B} through the cave, since _ [did not know the path|led the way].
names | {A} gave {B} a dictionary, as _ [had two of them|did not own one].
names | {A} interviewed {B} for the paper, and _ [asked the questions|answered the questions].
names | {A} ran faster than {B}, so _ [won the race|came in second].
names | {A} waited for {B} at the gate, as _ [had come early|had come late].
names | {A} babysat the twins of {B}, so _ [earned some money|could go to the theater].
names | {A} wrote to {B} in prison, and _ [mailed the letters from home|read the letters in a cell].
names | {A} saw {B} steal a watch, so _ [called the police|was arrested by the police].
names | {A} translated the menu for {B}, because _ [spoke French|spoke no French].
names | {A} drove {B} to work because _ [owned a car|did not own a car].
names | {A} fed the cat of {B} in July, as _ [was at home|was away on vacation].
names | {A} splashed {B} with the hose, and _ [giggled at the prank|had to change clothes].
names | {A} adopted the kitten of {B}, because _ [wanted a pet|could not keep a pet].
names | {A} cut the hair of {B}, and _ [held the scissors|liked the new style].
names | {A} served lunch to {B}, and _ [got a tip|left a tip].
names | {A} thanked {B} for the ride, and _ [got out of the car|drove on].
names | {A} graded the essay of {B}, so _ [used a red pen|hoped for a good mark].
names | {A} let a rope down the cliff to {B}, because _ [was at the top|was at the bottom].
names | {A} envied {B}, because _ [had little luck|had a lot of luck].
names | {A} made fun of {B}, so _ [had to stay after class|went home in tears].
names | {A} trusted {B} with the keys, and _ [left on a trip|looked after the house].
names | {A} invited {B} to dinner, so _ [set the table|brought the host some flowers].
names | {A} bumped into the bike of {B}, so _ [offered to pay|asked for money].
names | {A} nursed {B} back to health, as _ [was a caring person|was very sick].
names | {A} lost the bet with {B}, so _ [handed over ten dollars|received ten dollars].
names | {A} scared {B} with a mask, and _ [laughed behind it|screamed].
names | {A} rented a room from {B}, so _ [paid the rent|collected the rent].
names | {A} hid behind the tree while {B} counted, and _ [kept still|came looking].
names | {A} proposed to {B}, and _ [offered a ring|said yes].
names | {A} coached {B} for the big match, so _ [planned the training|did the training].
names | {A} dropped a plate on the foot of {B}, so _ [said sorry|yelled in pain].
names | {A} let {B} copy the notes, because _ [had been in class|had missed class].
names | {A} arrested {B}, because _ [was a police officer|had robbed a bank].
names | {A} begged {B} for a day off, because _ [was overworked|was the boss].
book/bag | The book would not fit into the bag, because the _ was too [thick|small].
piano/truck | The piano did not go into the truck, because the _ was too [large|narrow].
ball/window | The ball hit the window, and the _ [bounced off|broke into pieces].
rock/egg | The rock fell on the egg, and the _ [was not harmed|was crushed].
sofa/chair | The sofa seats more people than the chair, because the _ is [wider|narrower].
lamp/candle | We used the lamp and not the candle, because the _ was [brighter|too dim].
tea/juice | I drank the tea before the juice, because the _ [was getting cold|had to chill first].
boots/sandals | She wore boots, not sandals, in the snow, since the _ are [warm|open and airy].
bus/train | He took the bus and not the train, because the _ was [on time|canceled].
stairs/elevator | We took the stairs, not the elevator, because the _ [kept us fit|got stuck often].
hill/valley | The village moved from the valley to the hill, as the _ was [safe|often flooded].
knife/spoon | He cut the bread with a knife, not a spoon, because the _ is [sharp|blunt].
wool/silk | She chose wool over silk for the cold trip, because the _ was [thicker|thinner].
oak/rose | The storm bent the rose but not the oak, because the _ was [sturdy|slender].
mouse/cat | The mouse slipped away from the cat, because the _ was [tiny|too slow].
shark/seal | The shark chased the seal, because the _ was [hungry|a good meal].
hammer/vase | The hammer struck the vase, and the _ [stayed whole|shattered].
towel/floor | I dried the floor with the towel, and now the _ is [soaked|dry].
kettle/cup | I poured water from the kettle into the cup until the _ was [empty|full].
bottle/glass | Milk was poured from the bottle into the glass, so the _ [got lighter|filled up].
paint/wall | The paint did not stick to the wall, because the _ was too [runny|greasy].
rope/box | The rope snapped under the box, because the _ was too [thin|heavy].
ice/sun | The ice melted in the sun, because the _ was [thin|hot].
salad/steak | A vegan friend liked the salad, not the steak, as the _ was [all greens|beef].
coat/shirt | It was hot, so he took off the coat and kept on the shirt; the _ was [heavy|light].
novel/poem | I read the poem before the novel, because the _ was [long|short].
hotel/tent | We picked the hotel over the tent, as the _ was [comfortable|leaky].
camera/phone | He took photos with the camera, because the _ had [full power|a dead battery].
beach/forest | We left the beach for the forest, because the _ was [too sunny|shady].
apple/lemon | The child ate the apple but spat out the lemon, because the _ was [sweet|sour].
dog/fence | The dog jumped over the fence, because the _ was so [athletic|low].
nail/magnet | The nail flew to the magnet, because the _ [was made of iron|pulled on metal].
key/lock | The key did not turn in the lock, since the _ was [bent|full of sand].
pen/pencil | She signed with a pen, not a pencil, because the _ [dries for good|rubs off].
bread/oven | The bread burned in the oven, because the _ was [left in too long|set too hot].
shelf/books | The shelf sagged under the books, because the _ must have been too [weak|heavy].
boat/lake | The boat could not cross the lake, since the _ had [a hole|frozen over].
desert/swamp | Frogs live in the swamp and not the desert, as the _ is [dry|wet].
feather/coin | The coin landed before the feather, because the _ was [slowed by air|heavier].
sponge/brick | The sponge soaked up more water than the brick, since the _ is [soft|hard].
"""

# yes-question | the same question, turned to no.
QUESTIONS = """
does ice float on water | does ice sink in water
is a feather lighter than a brick | is a feather heavier than a brick
do spiders have eight legs | do spiders have six legs
is the sun a star | is the sun a planet
do people breathe in oxygen | do people breathe in gold
does a week have seven days | does a week have nine days
is a whole year longer than a month | is a whole year shorter than a month
can a person see stars on a clear night | can a person see stars through a thick roof
is a lemon sour | is a lemon salty
does a triangle have three sides | does a triangle have five sides
can you cut paper with scissors | can you cut granite with scissors
is boiling water hot | is boiling water cold
do cacti grow in deserts | do cacti grow on icebergs
is the ocean salty | is the ocean sugary
can an adult lift a chair | can an adult lift a bus
is snow white | is snow black
do plants need light to grow well | do plants need darkness to grow well
does a car need fuel or power to run | does a car need milk or bread to run
is a mile longer than an inch | is a mile shorter than an inch
do babies learn to crawl before they run | do babies learn to run before they crawl
is midnight dark in most places | is midnight sunny in most places
can a deaf person read a book | can a deaf person hear a whisper
is the moon smaller than the earth | is the moon larger than the earth
can a door be made of wood | can a door be made of soup
is a baby younger than its mother | is a baby older than its mother
is a banana yellow when ripe | is a banana blue when ripe
can you drink from a cup | can you drink from a brick
do most cars have four wheels | do most cars have nine wheels
do most birds lay eggs | do most birds lay bricks
is fire dangerous to touch | is fire pleasant to touch
is glue sticky | is glue crunchy
can you ride a bicycle on a road | can you ride a bicycle on a cloud
can a person get sunburned in summer | can a person get sunburned in a cellar
do most people sleep at night | do most people sleep in trees
can a letter be sent by mail | can a house be sent by email
is a grape smaller than a melon | is a grape bigger than a melon
does rain fall from clouds | does rain fall from trees
do rivers flow downhill | do rivers flow uphill
does the sun rise in the east | does the sun rise in the west
is Africa a continent | is Africa a city
is Paris a city | is Paris an ocean
is the Pacific an ocean | is the Pacific a mountain
is winter colder than summer in Canada | is winter hotter than summer in Canada
can a fish breathe under water | can a fish breathe in outer space
do humans have two lungs | do humans have six lungs
do fingernails grow back after being cut | do arms grow back after being cut
does a dozen mean twelve | does a dozen mean twenty
is ten more than seven | is ten less than seven
can you walk across a bridge | can you walk across a rainbow
is a diamond hard | is a diamond soft
is a pillow soft | is a pillow sharp
does sugar taste sweet | does sugar taste bitter
do trains run on rails | do boats run on rails
do airplanes have wings | do bicycles have wings
is a violin played with a bow | is a violin played with a shovel
are there sixty minutes in an hour | are there ninety minutes in an hour
is a kitten younger than a grown cat | is a kitten older than a grown cat
does smoke rise from a fire | does smoke rise from a snowball
do owls hunt at night | do owls hunt with spears
is chess played on a board | is chess played on a trampoline
do people wear gloves on their hands | do people wear gloves on their feet
is a firefighter trained to put out fires | is a firefighter trained to pull out teeth
can a broken cup be glued | can a broken cup heal by itself
is breakfast eaten in the morning | is breakfast eaten at midnight
do wheels make it easier to move a cart | do wheels make it harder to move a cart
is a jet faster than a canoe | is a jet slower than a canoe
"""
