"""Things, living things and school science of the pocket set, written for this project.

Plain tables in text blocks: a header ``= name`` starts a family or cluster, every other line is one
fact. Inside a family no value fits two keys, unless a last field ``~group`` says that two facts
are alike: those are never offered against each other.
"""

from __future__ import annotations

# thing | what it is used to do
THINGS = """
= kitchen
a spoon | eat soup
a fork | pick up noodles from a plate ~beat
a bread knife | slice a loaf of bread ~blade
a frying pan | fry an egg
a kettle | heat water for tea
a colander | drain water from pasta
a whisk | beat eggs ~beat
a rolling pin | flatten dough
an oven mitt | lift a hot baking tray ~cloth
a can opener | open a tin of beans
a corkscrew | open a bottle of wine
a grater | shred a block of cheese
a coffee mug | drink hot coffee
a measuring cup | find the right amount of flour
a refrigerator | keep milk cold
a toaster | brown slices of bread
a dish towel | dry wet plates ~cloth
a cookie jar | store cookies
a lunch box | carry a sandwich to school
a peeler | take the skin off a potato ~blade
= house
a broom | sweep crumbs off the floor
a mop | wash a muddy floor
a vacuum cleaner | get dust out of a carpet
a clothespin | hang wet socks on a line
a washing machine | clean a load of dirty clothes
a coat rack | hang up a jacket ~hook
a doormat | wipe muddy shoes
a trash can | keep garbage until it is picked up
a smoke alarm | wake a sleeping family in a fire
a house key | unlock the front door
a doorbell | tell the family that a guest is outside
a curtain | keep the morning sun out of a room
a bookcase | store a row of novels
a fan | move the air in a hot room
a heater | warm a cold room
a sofa | seat three people
a light bulb | light up a dark room
an iron | take wrinkles out of a shirt
a ceiling hook | hang up a flower basket ~hook
a stepladder | reach a high shelf
= bath and bed
a toothbrush | clean teeth
a comb | untangle hair
a bath towel | dry off after a shower ~dry
a bar of soap | wash dirty hands
a razor | remove a beard
a bathroom scale | find out how heavy a person is
a bandage | cover a cut on a finger
a pillow | rest a head at night
a blanket | keep a sleeper warm ~bed
an alarm clock | wake up at six in the morning
a mirror | see how a new hat looks
a pair of tweezers | pull out a splinter
a pair of slippers | keep bare feet warm indoors
a nail clipper | shorten fingernails
a hair dryer | blow wet hair dry ~dry
a night-light | comfort a child who fears the dark ~bed
= school and office
a pencil | write a note that can be rubbed out
an eraser | remove a wrong line from a drawing
a ruler | draw a straight line
a pair of scissors | cut paper into shapes
a glue stick | stick a photo into an album
a globe | see where the oceans are
a calculator | add up long columns of numbers
a stapler | hold several sheets of paper together
an envelope | send a letter
a printer | put a computer document on paper
a telephone | talk to a friend far away
a calendar | find out what day of the week it is
a dictionary | look up what a word means
a backpack | carry books to school
a pencil sharpener | give a pencil a new point
a whiteboard | show notes to a whole class
= garden and workshop
a shovel | dig a hole for a tree
a rake | gather fallen leaves
a watering can | water flowers in pots
a lawn mower | cut tall grass
a wheelbarrow | move a load of soil
a flowerpot | grow a small plant indoors
a hedge trimmer | shape a row of bushes
a bird feeder | give seeds to sparrows
a scarecrow | frighten crows away from a field
a hammer | drive nails into wood
a screwdriver | tighten a loose screw
a saw | cut a board in two
a wrench | loosen a tight bolt
a sheet of sandpaper | smooth a rough board
a tape measure | find out how long a table is
a paintbrush | put a new color on a fence
a clamp | press two boards together while glue dries
a drill | bore a hole in a wall
= clothes
an umbrella | walk in the rain without getting wet ~wet
a scarf | protect a neck from cold wind
a pair of mittens | keep fingers warm in the snow
a pair of sunglasses | protect eyes from bright light
a belt | hold up loose trousers
a wallet | carry paper money
a button | close the front of a shirt ~close
a sewing needle | mend a torn sleeve
a zipper | shut the front of a jacket ~close
a suitcase | take clothes on a long trip
an apron | keep a shirt clean while cooking
a pair of rubber boots | wade through a deep puddle ~wet
a wedding ring | show that one is married
a shoelace | fasten a shoe
a wristwatch | tell the time on the go
a hearing aid | hear faint voices better
= outdoors
a tent | sleep outdoors in the woods
a compass | find out which way is north
a box of matches | start a campfire
a fishing rod | catch trout in a lake
a life jacket | stay afloat after falling from a boat
an anchor | keep a boat from drifting away
a paddle | move a canoe forward
a bicycle pump | fill a flat tire
a bicycle helmet | protect a head in a fall
a car jack | raise a car to change a wheel
a seat belt | hold a passenger in place in a crash
a pair of binoculars | watch faraway birds
a dog leash | walk a puppy along a busy street
a stroller | take a baby through the park
a sled | slide down a snowy hill
a kickstand | keep a parked bicycle upright
a whistle | signal the end of a match
a tennis racket | hit a ball over a net
a flashlight | see the path on a dark night
a parachute | land safely after a jump from a plane
"""

# key | value. The first word group names a family; how it is asked is in make_pocket.
FAMILIES = """
= organ
the heart | pumping blood through the body
the lungs | taking in oxygen from the air
the stomach | breaking down food with acid
the kidneys | cleaning the blood and making urine
the brain | thinking and controlling the body
the skin | covering the whole body and keeping germs out
the muscles | pulling on bones to make them move
the skeleton | holding the body up
the eyes | seeing light and color
the ears | detecting sound
the nose | smelling
the tongue | tasting food
the teeth | chewing food
the eyelids | covering the eyes during sleep
the ribs | protecting the heart like a cage
the nails | shielding the tips of fingers and toes
= plantpart
the roots | taking in water from the soil
the leaves | making food from sunlight
the stem | carrying water upward and holding up the leaves
the flower | attracting bees with color and scent
the fruit | surrounding and protecting the seeds
the bark | shielding the trunk
the thorns | keeping hungry animals away
the seed | growing into a new plant
= instrument
a thermometer | the temperature of a room
a meter stick | the length of a table
a pan balance | the mass of a rock
a stopwatch | the time a runner needs
a rain gauge | the amount of rain in a week
an anemometer | the speed of the wind
a barometer | the pressure of the air
a graduated cylinder | the volume of some juice
a wind vane | the direction of the wind
a speedometer | the speed of a car
a sound meter | the loudness of a concert
a voltmeter | the voltage of a battery
= scientist
a botanist | plants
a geologist | rocks ~earth
an astronomer | stars and planets
a meteorologist | the weather
a paleontologist | fossils of dinosaurs
an ornithologist | birds
an entomologist | insects
a seismologist | earthquakes ~earth
a linguist | languages
a psychologist | the human mind
a historian | events of the past
a mathematician | numbers and shapes
= planet
Mercury | being the planet closest to the Sun
Venus | being the hottest planet, under thick clouds
Earth | having oceans full of life
Mars | its rusty red ground
Jupiter | being the largest planet
Saturn | its wide, bright rings
Uranus | spinning while tipped on its side
Neptune | being the planet farthest from the Sun
= baby
a puppy | a dog
a kitten | a cat
a calf | a cow
a foal | a horse
a lamb | a sheep
a chick | a hen
a tadpole | a frog
a caterpillar | a butterfly
a cygnet | a swan
a piglet | a pig
a fawn | a deer
a gosling | a goose
a duckling | a duck
a joey | a kangaroo
an eaglet | an eagle
a maggot | a fly
= device
a desk lamp | from electricity to light
a toaster | from electricity to heat
an electric fan | from electricity to motion
a loudspeaker | from electricity to sound
a solar panel | from light to electricity
a wind turbine | from motion to electricity
a drum | from motion to sound
a car engine | from fuel to motion
a gas stove | from fuel to heat
a microphone | from sound to electricity
= unit
meters | the length of a garden path
kilograms | the mass of a sack of potatoes
seconds | the time of a short sprint
liters | the volume of a fish tank
degrees Celsius | the temperature of bath water
kilometers per hour | the speed of a train
newtons | the force of a push
volts | the voltage of a battery
= landform
an island | land with water on every side
a valley | low land between hills or mountains
a plateau | high land with a flat top
a canyon | a deep gap with steep rock walls
a desert | dry land where little grows
a glacier | a slow river of ice
a volcano | a mountain that can throw out lava
a delta | land built up at the mouth of a river
= home
a polar bear | on the ice of the Arctic
a camel | in a hot desert
a whale | in the open ocean ~sea
a monkey | high in the trees of a rain forest
a mole | in a tunnel under a lawn
a bat | in a dark cave
a trout | in a cold mountain stream ~fresh
a mountain goat | on a steep, rocky cliff
a beaver | in a lodge of sticks in a river ~fresh
a honeybee | in a hive
a zebra | on a grassy plain in Africa
a tapeworm | inside the gut of another animal
a pigeon | in a city square
a hamster | in a cage with a running wheel
a frog | beside a pond ~fresh
a clothes moth | in a closet full of wool coats
= diet
a panda | bamboo
a koala | gum tree leaves ~leaf
an owl | a mouse
an anteater | termites ~bugs
a hummingbird | nectar ~sweet
a cow | grass
a squirrel | acorns
a shark | a seal
an earthworm | rotting leaves ~leaf
a woodpecker | grubs under bark ~bugs
a spider | a trapped fly ~bugs
a mosquito | blood ~sweet
a lion | a zebra
a sea otter | sea urchins
a fruit bat | ripe mangoes ~sweet
a pet goldfish | fish flakes
= class
a dog | mammal
a horse | mammal
a mouse | mammal
a rabbit | mammal
a dolphin | mammal
a goat | mammal
an elephant | mammal
a tiger | mammal
a sparrow | bird
a penguin | bird
a parrot | bird
a hen | bird
an ostrich | bird
a robin | bird
a crow | bird
a turkey | bird
a salmon | fish
a cod | fish
a tuna | fish
a goldfish | fish
an eel | fish
a sardine | fish
a herring | fish
a pike | fish
a rattlesnake | reptile
a crocodile | reptile
a lizard | reptile
a tortoise | reptile
an iguana | reptile
a gecko | reptile
a cobra | reptile
an alligator | reptile
a bullfrog | amphibian
a toad | amphibian
a newt | amphibian
a salamander | amphibian
a tree frog | amphibian
an ant | insect
a beetle | insect
a wasp | insect
a grasshopper | insect
a cricket | insect
a mosquito | insect
a cockroach | insect
a moth | insect
"""

# term | what it means | an everyday example. Four terms a cluster.
TERMS = """
= phase
evaporation | a liquid turning into a gas | A puddle slowly vanishes on a hot afternoon.
condensation | a gas turning into a liquid | Drops appear on the outside of a chilled glass.
freezing | a liquid turning into a solid | A pond becomes hard enough to skate on.
melting | a solid turning into a liquid | A snowman shrinks to a pool of water.
= ground
erosion | soil or sand being carried away | A flooded river takes part of its bank along.
deposition | sand or mud being dropped in a new place | A sandbar grows at the mouth of a river.
weathering | rock breaking into smaller pieces in place | Ice in a crack slowly splits a boulder.
an earthquake | a sudden shaking of the ground | Cups rattle and walls crack all over a city.
= role
a producer | a living thing that makes its own food | A fern turns sunlight into sugar.
a predator | an animal that hunts other animals | A hawk dives down and grabs a mouse.
a decomposer | a living thing that breaks down dead matter | Mold slowly turns a fallen log to soil.
a parasite | a living thing that feeds on a living host | A tick sucks the blood of a deer for days.
= behavior
hibernation | sleeping through the winter | A groundhog curls up in its burrow until spring.
migration | moving to another region as seasons change | Geese fly south every autumn.
camouflage | blending in with the surroundings | A green frog on a leaf is almost invisible.
mimicry | looking like a more dangerous kind of animal | A harmless fly has the stripes of a wasp.
= plantlife
pollination | pollen being carried from flower to flower | A bee dusted in yellow visits two roses.
germination | a seed beginning to grow | A bean in wet cotton splits and sends out a root.
photosynthesis | plants making sugar with the help of light | A fern in the sun makes its own food.
seed dispersal | seeds being spread to new places | Burrs from a bush ride away on a dog's fur.
= force
gravity | the pull of Earth on everything near it | A pencil that rolls off the desk falls down.
friction | rubbing that slows moving things down | A sled stops as soon as it reaches dry sand.
magnetism | a pull on things made of iron | Pins jump across a table to a metal bar.
buoyancy | the upward push of water on things in it | A ball held under water pops back up.
= light
reflection | light bouncing off a surface | A still pond shows a picture of the trees.
refraction | light bending as it enters another material | A straw in water looks broken.
absorption | light being soaked up by a material | A black car seat gets hot in the sun.
transmission | light passing through a material | The street can be seen through a clear pane.
= heat
conduction | heat moving between things that touch | The handle of a spoon in hot soup gets hot.
convection | heat moving along with flowing air or liquid | Warm air climbs from a heater upward.
radiation | heat traveling as rays, even through space | The Sun warms a face from far away.
insulation | slowing down heat with a poor conductor | A foam box keeps ice cream hard for hours.
= sky
rotation | a planet spinning around its own axis | Day turns into night and back in 24 hours.
revolution | a planet moving around its star | Earth needs one year to get back to the same place.
an eclipse | one body in space hiding another | The Moon covers the Sun for a few minutes.
a tide | the daily rise and fall of the sea | A dry beach at noon is under water at six.
= weather
a drought | a long time without rain | Fields crack and wells run dry all summer.
a flood | water covering land that is usually dry | People row boats along the main street.
a blizzard | heavy snow with strong wind | Drivers see only white, and drifts block the road.
a tornado | a fast, spinning column of air | A dark funnel touches down and tears off a roof.
= property
mass | the amount of matter in an object | A balance shows that a rock equals nine coins.
volume | the space an object takes up | A stone makes the water in a jar rise by a thumb.
temperature | how hot or cold something is | The red line climbs when the bulb is held in a hand.
hardness | how well a material resists scratches | A nail leaves no mark on a piece of quartz.
= method
a hypothesis | an idea that a test can check | "I think that salt water freezes later," Tia writes.
an observation | something noticed with the senses | "The leaf has turned yellow," Ben notes.
a conclusion | what the results of a test show | "So my guess was wrong," Ana writes at the end.
a control group | the untreated part of a test | One of two beds gets no plant food at all.
= power
solar power | electricity from sunlight | Dark panels on a roof run the lamps of a house.
wind power | electricity from moving air | Tall white turbines spin on a breezy hill.
hydropower | electricity from flowing water | A river turns wheels inside a dam.
geothermal power | electricity from the heat inside Earth | Steam from a deep well drives an engine.
= rock
igneous rock | melted rock that has cooled | Lava hardens into a black slope.
sedimentary rock | layers pressed together over time | Mud on a sea floor slowly becomes stone.
metamorphic rock | rock changed by heat and pressure | Deep down, limestone is baked into marble.
a fossil | a trace of a living thing from long ago | A cliff holds the print of an ancient shell.
= stage
the egg stage | waiting to hatch | A tiny white ball sits motionless under a leaf.
the larva stage | eating and growing fast | A caterpillar chews on cabbage all day.
the pupa stage | changing form inside a hard case | A brown case hangs from a twig for two weeks.
the adult stage | flying off to lay eggs | A new butterfly dries its wings and takes off.
= machine
a lever | a bar that turns on a fixed point | Two children ride up and down on a seesaw.
a pulley | a wheel with a rope around it | A flag is pulled to the top of a pole.
an inclined plane | a slanting surface | A piano is rolled up a ramp into a truck.
a wedge | a shape with a thin edge that splits things | An ax head cuts into a log.
= resource
recycling | turning waste into new products | Old cans are melted down to make bicycles.
reusing | using the same thing again as it is | An empty jam jar becomes a pencil holder.
saving energy | using less electricity or fuel | A family turns off the lamps in empty rooms.
pollution | harmful waste getting into nature | Oil from a leaky ship spreads along a beach.
= sound
pitch | how high or low a tone is | A flute sounds squeaky, and a tuba sounds deep.
loudness | how strong a sound is | A baby can sleep near a whisper, but not near a drum.
an echo | a sound that bounces back | A shout into a canyon is heard a second time.
vibration | fast movement back and forth | A plucked string looks blurry for a moment.
"""

# what happens first | what follows. "It" is the thing named first. Four a cluster.
EFFECTS = """
= e1
an ice cube is left in a warm room | it turns into water
a wet shirt hangs in the sun | it dries
a glass vase falls on a stone floor | it breaks
a rubber ball is dropped on concrete | it bounces
= e2
a spoonful of sugar is stirred into hot tea | it dissolves
an iron chain is left in the rain for months | it rusts
a balloon is pricked with a pin | it bursts
a sheet of paper is held over a flame | it burns
= e3
a potted plant gets no water for a month | it wilts
a pebble is thrown into a pond | it sinks
a cork is thrown into a pond | it floats
a lump of butter is put in a hot pan | it melts
= e4
bread dough with yeast stands in a warm place | it rises
a carton of milk stands in the sun for two days | it turns sour
a tray of water is put in a freezer | it becomes solid
a cotton sponge is dipped in a full bucket | it gets soaked
= e5
a lamp is unplugged | it goes dark
a bell is struck with a hammer | it rings
a seed is planted in warm, moist soil | it sprouts
a rubber band is pulled at both ends | it gets longer
= e6
a wool sweater is washed in very hot water | it shrinks
a boat gets a big hole in its bottom | it fills with water
a cup is filled past its brim | it overflows
a helium balloon is let go outdoors | it flies up
= e7
a kernel of popcorn is heated | it pops
a sharp knife is rubbed on a rock for an hour | it gets dull
a squeaky wheel is oiled | it turns quietly
a dusty carpet is beaten | it gets cleaner
= e8
a bicycle rolls downhill without brakes | it speeds up
a tire rolls over a broken bottle | it loses air
a phone is used all day without charging | its battery runs out
a mirror is turned toward the sun | it throws back the light
= e9
an egg is boiled for ten minutes | it gets firm inside
a cut apple lies on a plate for hours | it turns brown
a soda can is shaken and then opened | it sprays foam
a campfire is covered with sand | it goes out
= e10
a window is opened on a freezing day | the room gets colder
clouds grow thick and dark | it is likely to rain
the sun sinks below the horizon | stars begin to show
a strong wind reaches a lake | waves form on the water
= e11
a person runs up ten flights of stairs | the heart beats faster
a person eats a meal after a long fast | the hunger goes away
a person reads in bed very late at night | the eyes get tired
a person steps out of a cold lake into the wind | the skin gets goose bumps
= e12
a person touches a cactus | the finger is pricked
a person eats spoiled meat | the stomach aches
a person looks at a very bright lamp | the pupils shrink
a person sits on a leg for an hour | the foot tingles
= e13
a dam is built across a river | a lake forms behind it
all the trees on a hill are cut down | rain washes soil away
rabbits lose all their natural enemies | there are more and more rabbits
a lake gets polluted with poison | many fish die
= e14
a snowbank lies in warm spring sunshine | it gets smaller
a stretched spring is let go | it snaps back
a kite is flown in a strong wind | it climbs into the sky
a sweaty sock lies in a gym bag for days | it starts to smell
= e15
a glass of ice water stands on a table in summer | the outside of the glass gets wet
a pot of water boils for an hour | the water level drops
a bowl of ice cream stands in the sun | the ice cream becomes runny
a lid is put on a burning candle | the flame dies
= e16
a car runs out of fuel on the highway | it rolls to a stop
an oven is switched on | it heats up
a light switch is flipped in a dark room | the room gets bright
a thin branch is bent too far | it snaps
= e17
a magnet is held over a pile of iron pins | the pins jump up to it
a magnet is held over a pile of sand | nothing is pulled up
two magnets face each other with like poles | they push each other apart
a magnet is dropped into deep water | it goes to the bottom
= e18
salt is scattered on an icy road | the ice melts
a car turns too fast on an icy road | the car slides
water is poured on an icy road at night | a new layer of ice forms
hot ashes fall on dry grass | a fire starts
= e19
a red shirt is washed together with white socks | the socks turn pink
a shirt is splashed with bleach | pale spots appear
a shirt is worn in a mud fight | it gets dirty
a shirt catches on a thorn bush | it tears
= e20
a sunflower stands beside a bright window | it bends toward the light
a tree loses its leaves in autumn | it stands bare all winter
a tomato plant gets water and sun | it bears fruit
a weed is pulled out with its roots | it dies
= e21
a snowball is thrown into a fire | it hisses and disappears
a marshmallow is held in a fire | it gets brown and soft
a green, wet branch is put on a fire | it smokes a lot
a steel fork is held in a fire for a short time | its handle becomes hot
= e22
a baby is hungry in the night | it cries
a dog hears a stranger at the door | it barks
a cat sees a mouse | it gets ready to pounce
a turtle is frightened | it pulls in its head
"""

# Header: the task that asks. Then two opposite groups: what is true of them | the members;
# a line that starts with two spaces goes on with the one before.
SORTS = """
= inherited ARC-Easy
is inherited from the parents | eye color; blood type; freckles; natural hair color; the shape of
  the nose; the number of toes; dimples; skin color at birth
has to be learned | riding a bicycle; speaking French; tying a bow; reading a map; playing the
  flute; knowing the alphabet; using chopsticks; good table manners
= living ARC-Easy
is a living thing | a mushroom; an oak tree; a worm; a rose bush; a patch of moss; a crab; a fern;
  a snail
is a nonliving thing | a pebble; a cloud; a river; a teapot; an icicle; a sand dune; a coin; a
  rainbow
= change ARC-Challenge
is a change into a new substance | burning a log; baking a cake; letting a gate rust; lighting a
  match; letting milk turn sour; frying an egg; setting off fireworks; letting leaves rot
leaves the substance the same | tearing a letter; crushing a can; sharpening a pencil; folding a
  towel; breaking a plate; chopping a carrot; bending a wire; grinding pepper
= state ARC-Easy
is a liquid at room temperature | milk; vinegar; olive oil; orange juice; sea water; gasoline; soy
  sauce; ink
is a gas at room temperature | oxygen; helium; carbon dioxide; hydrogen; nitrogen; neon; the air
  in a tire; natural gas
= current ARC-Challenge
would let electricity flow through it | a copper wire; a steel fork; a strip of aluminum foil; a
  gold ring; an iron bar; a brass key; a tin can; a silver spoon
would block the flow of electricity | a wooden stick; a rubber glove; a plastic comb; a glass
  marble; a wool sock; a paper cup; a clay tile; a wax candle
= magnet ARC-Challenge
would be pulled toward a magnet | an iron nail; a steel pin; a steel paper clip; an iron
  horseshoe; a heap of iron dust; a steel bolt
would not be pulled toward a magnet | a copper pipe; a gold earring; a soda can of aluminum; a
  silver bracelet; a brass doorknob; a lead weight
= float openbookqa
would float in a swimming pool | a wine cork; a dry stick; a beach ball; a rubber duck; a foam
  cup; an apple; an empty, closed bottle; a swim ring
would sink in a swimming pool | a brick; a steel wrench; a gold coin; a stone; a horseshoe; a
  glass bead; a door key; a china plate
= clear openbookqa
can be seen through | a window pane; a clean drinking glass; plastic wrap; a fish bowl; a camera
  lens; a thin sheet of ice; the lens of reading glasses; a drop of water
cannot be seen through | a brick wall; a cardboard box; a wooden door; a tin roof; a leather bag;
  a slice of bread; a book cover; a pile of coal
= origin openbookqa
comes from a plant | cotton; paper; maple syrup; linen; cocoa; flour; olive oil soap; bamboo
  flooring
comes from an animal | wool; leather; honey; butter; silk; cheese; beeswax; a goose feather
= underground openbookqa
grows under the ground | a carrot; a potato; a radish; a beet; a turnip; a sweet potato; a
  parsnip; a piece of ginger
grows above the ground | a tomato; a pumpkin; a head of lettuce; a pea; an ear of corn; a
  cucumber; a pepper; a strawberry
= glow ARC-Challenge
makes its own light | the Sun; a candle flame; a firefly; a bolt of lightning; a lit lamp; a
  campfire; glowing lava; a distant star
can only be seen by light from elsewhere | the Moon; a mirror; the planet Mars; fresh snow; a road
  sign; a white wall; a silver plate; a lake
= backbone ARC-Easy
has a backbone | a fox; a swan; a trout; a python; a bear; a camel; a giraffe; a whale
has no backbone | an earthworm; a jellyfish; a slug; an octopus; a spider; a clam; a starfish; a
  squid
= health openbookqa
is good for the body | sleeping eight hours; eating vegetables; washing hands before meals;
  walking every day; drinking enough water; stretching in the morning; getting fresh air; brushing
  teeth twice a day
is bad for the body | smoking cigarettes; sitting still all week; living on candy; breathing in
  paint fumes; staring into the Sun; hardly ever sleeping; drinking dirty water; listening to
  music at full blast
"""

# question | what is changed | what is measured | what is kept the same | what does not matter
EXPERIMENTS = """
whether plants grow taller with more light | the hours of light per day | the height of the plants
  | the amount of water each plant gets | the color of the notebook
whether sugar dissolves faster in warm water | the temperature of the water | the time until the
  sugar is gone | the amount of sugar in each cup | the day of the week
whether a heavier toy car rolls farther | the weight of the car | the distance the car rolls | the
  height of the ramp | the name given to the car
whether a longer string makes a pendulum swing slower | the length of the string | the time of one
  swing | the weight at the end of the string | the color of the string
whether salt keeps water from freezing | the amount of salt in the water | the temperature at
  which ice forms | the amount of water in each cup | the shape of the salt shaker
whether a warm ball bounces higher than a cold one | the temperature of the ball | the height of
  the bounce | the height from which the ball is dropped | the time on the wall clock
whether thicker paper towels soak up more water | the thickness of the towel | the amount of water
  soaked up | the size of each piece of towel | the color of the table
whether ants prefer sweet food | the kind of food on each plate | the number of ants on each plate
  | the distance of each plate from the nest | the pen used for notes
whether more yeast makes dough rise higher | the amount of yeast | the height of the dough after
  an hour | the amount of flour in each bowl | the pattern on the bowls
whether black cloth gets hotter in the sun than white cloth | the color of the cloth | the
  temperature under the cloth | the time in the sun | the song on the radio
whether a bigger parachute falls more slowly | the size of the parachute | the time until it lands
  | the weight hung on the parachute | the shoes of the student
whether more batteries make a bulb brighter | the number of batteries | the brightness of the bulb
  | the kind of bulb | the name of the teacher
"""

# Four kinds of living things, each eaten by the next one.
CHAINS = """
in a meadow | grass | grasshoppers | frogs | storks
in a pond | algae | water fleas | minnows | herons
on a farm | wheat | mice | weasels | owls
in the sea | plankton | krill | penguins | leopard seals
in a forest | oak leaves | caterpillars | songbirds | hawks
in a desert | cactus seeds | kangaroo rats | rattlesnakes | eagles
in a garden | lettuce | slugs | toads | crows
in the Arctic | tiny sea plants | cod | seals | polar bears
on a savanna | shrubs | termites | aardvarks | lions
along a coast | kelp | sea urchins | sea otters | sharks
in a lake | pondweed | snails | perch | otters
in a vineyard | grapes | wasps | spiders | wrens
"""

# Need | what meets it. Four a cluster; the reader has to think of a property first.
NEEDS = """
= material
a chair that is carved with a knife and sanded | wood
a wire that carries electricity to a lamp | copper
a window that lets daylight in | glass
a tire that grips the road and springs back | rubber
= fabric
a sweater that traps body heat in winter | thick wool
a diver's suit that bends with every move and keeps water out | stretchy rubber
a tall sail that must be strong but light | tightly woven nylon
a welder's glove that must not burn or rip | heavy leather
= beak
a bird that cracks hard seeds | a short, thick beak
a bird that tears meat | a sharp, hooked beak
a bird that sips nectar from deep flowers | a long, thin tube of a beak
a bird that scoops fish out of the sea | a beak with a big pouch
= feet
an animal that swims across ponds | webbed feet
an animal that digs tunnels | wide feet with strong claws
an animal that walks over loose snow | broad, furry feet
an animal that hangs from branches | hooked toes that grip
= climate
a plant in a desert | a thick stem that stores water
a plant floating on a pond | broad leaves full of air
a plant on a windy mountain top | a low shape close to the ground
a plant on the dim floor of a rain forest | large, dark leaves that catch weak light
= defense
a turtle that is too slow to flee | a hard shell to hide in
a skunk that is chased by a dog | a spray that smells awful
a gazelle that sees a lion far away | long legs for a fast escape
an octopus that is followed by a seal | a cloud of dark ink
= separate
a mixture of sand and iron dust | holding a magnet over it
a mixture of salt and water | letting the water evaporate
a mixture of pebbles and sand | shaking it through a sieve
a mixture of oil and water | skimming off the top layer
= tools
seeing the cells of an onion | a microscope
seeing the rings of Saturn | a telescope
seeing a broken bone inside an arm | an X-ray machine
seeing around a corner | a mirror on a stick
= rescue
a town that floods every spring | a higher river wall
a town that often loses its roofs to storms | stronger roof beams
a town with bad air from traffic | more electric buses
a town whose wells run dry in summer | a large water tank
= vehicle
carrying coal across an ocean | a cargo ship
carrying an injured hiker off a cliff | a helicopter
carrying thousands of workers under a big city | a subway train
carrying a satellite into space | a rocket
"""

# Producers of the food chains that take a singular verb.
UNCOUNTED = frozenset({"grass", "wheat", "plankton", "lettuce", "kelp", "pondweed"})

# Clusters of terms whose examples are whole events, so that "a good example of" can precede them.
EXAMPLES_STAND_ALONE = frozenset(
    {"phase", "ground", "behavior", "plantlife", "heat", "light", "machine", "resource"}
)

# Units that share their subject with another one, in other words. They stay together: here in
# training, so that no test row says again what a training row has said.
ONLY_TRAIN = """
thing/kitchen/a-bread-knife thing/kitchen/a-frying-pan thing/kitchen/a-kettle
thing/kitchen/a-toaster thing/kitchen/a-whisk thing/kitchen/a-colander
thing/kitchen/an-oven-mitt thing/kitchen/a-grater thing/kitchen/a-dish-towel
thing/kitchen/a-refrigerator
thing/house/an-iron thing/house/a-vacuum-cleaner thing/house/a-sofa
thing/house/a-washing-machine thing/house/a-clothespin thing/house/a-light-bulb
thing/house/a-curtain thing/house/a-fan thing/house/a-house-key thing/house/a-doorbell
thing/bath-and-bed/a-toothbrush thing/bath-and-bed/a-bandage thing/bath-and-bed/a-comb
thing/bath-and-bed/a-pair-of-tweezers thing/bath-and-bed/a-hair-dryer
thing/bath-and-bed/a-bath-towel thing/bath-and-bed/an-alarm-clock
thing/bath-and-bed/a-bathroom-scale
thing/school-and-office/a-ruler thing/school-and-office/an-envelope
thing/school-and-office/a-pair-of-scissors thing/school-and-office/a-pencil-sharpener
thing/school-and-office/an-eraser
thing/garden-and-workshop/a-shovel thing/garden-and-workshop/a-sheet-of-sandpaper
thing/garden-and-workshop/a-saw thing/garden-and-workshop/a-hammer
thing/garden-and-workshop/a-rake thing/garden-and-workshop/a-lawn-mower
thing/garden-and-workshop/a-screwdriver thing/garden-and-workshop/a-bird-feeder
thing/clothes/a-sewing-needle thing/clothes/a-button thing/clothes/a-wallet
thing/clothes/an-umbrella
thing/outdoors/a-bicycle-pump thing/outdoors/a-car-jack thing/outdoors/a-box-of-matches
thing/outdoors/a-tent thing/outdoors/a-fishing-rod thing/outdoors/a-dog-leash
routine/baking-bread routine/planting-a-tree routine/doing-laundry routine/hanging-a-picture
routine/brushing-teeth routine/mailing-a-letter routine/mowing-the-lawn routine/making-tea
routine/fixing-a-flat-bicycle-tire routine/changing-a-tire routine/lighting-a-campfire
routine/putting-up-a-tent routine/fishing routine/treating-a-cut routine/sewing-on-a-button
routine/doing-the-dishes routine/flying-a-kite
goal/circle goal/shirt goal/board goal/nail goal/lawn goal/gum goal/toast goal/screw goal/whisk
goal/pasta goal/burn goal/pencil goal/fish goal/dog goal/splinter goal/button goal/hair goal/lamp
goal/mirror goal/bread goal/seeds goal/ice goal/sweater goal/apple goal/butter goal/campfire
goal/balloon goal/eggs goal/plant goal/milk goal/sunburn
social/chef social/party social/camp goal/glue question/can-a-broken-cup-be-glued
social/alarms social/umbrella social/omelet social/marathon social/wallet social/smoke
effect/e1 effect/e2 effect/e3 effect/e4 effect/e5 effect/e6 effect/e8 effect/e9 effect/e13
effect/e14 effect/e15 effect/e16 effect/e17 effect/e19 effect/e21
term/phase term/ground term/force term/power term/role term/plantlife term/stage term/property
term/light term/heat
family/plantpart family/device/a-solar-panel family/device/a-wind-turbine
family/device/an-electric-fan family/device/a-toaster family/baby/a-caterpillar
family/baby/a-kitten family/organ/the-lungs family/instrument/a-pan-balance
family/instrument/a-thermometer family/instrument/a-graduated-cylinder
family/diet/a-shark family/diet/a-sea-otter chain/along-a-coast need/separate need/climate
sort/change sort/magnet sort/float sort/origin sort/state
twin/shark-seal twin/sofa-chair twin/nail-magnet twin/sponge-brick twin/feather-coin
twin/apple-lemon twin/key-lock twin/ice-sun
question/can-you-cut-paper-with-scissors question/is-a-kitten-younger-than-a-grown-cat
question/do-people-breathe-in-oxygen question/do-humans-have-two-lungs
question/do-cacti-grow-in-deserts question/is-a-feather-lighter-than-a-brick
question/is-a-lemon-sour question/can-a-person-get-sunburned-in-summer
question/does-a-car-need-fuel-or-power-to-run question/does-ice-float-on-water
"""

# The same for pairs of which both are wanted in the test rows.
ONLY_TEST = """
effect/e7 routine/making-popcorn goal/squeak
effect/e18 routine/shoveling-snow
effect/e22 need/defense
need/material sort/current sort/clear
effect/e10 question/does-rain-fall-from-clouds
"""
