"""Situations and routines of the pocket set, written for this project.

Both blocks are clusters: a header ``= name kind``, then situations, each followed by the one
answer that fits it after ``>``. The answers of a cluster are one another's wrong choices, so that
no choice is right more often than another and no length gives the right one away.
"""

from __future__ import annotations

# Four situations each. {A} and {B} are names; {he}, {him} and {his} stand for {A}.
SOCIAL = """
= fair feel
{A} won first prize at the science fair after weeks of work.
> proud
{A} heard strange footsteps in the empty house at night.
> scared
{A} sat through a three-hour speech about tax forms.
> bored
{A} dropped a tray of food in front of the whole school.
> embarrassed

= secret feel
{A} found out that {B} had told everyone {his} secret.
> betrayed
{A} got a long-awaited puppy on {his} birthday.
> thrilled
{A} carried a heavy backpack up the mountain all day.
> exhausted
{A} tried to read a manual in a language {he} had never learned.
> confused

= grandfather feel
{A} stood at the grave of a much-loved grandfather.
> sad
{A} watched a comedian and could not stop laughing.
> amused
{A} waited an hour for {B}, who then simply forgot to come.
> annoyed
{A} heard from the doctor that the lump was harmless.
> relieved

= medal feel
{A} saw {B} get the job that both of them had wanted.
> jealous
{A} lied to {his} mother and saw her cry because of it.
> guilty
{A} lay in a hammock by the sea with nothing to do.
> relaxed
{A} had to sing alone on a stage in five minutes.
> nervous

= newtown feel
{A} moved to a new town and knew nobody there.
> lonely
{A} got help from {B} when the car broke down at night.
> grateful
{A} heard {his} parrot suddenly sing an opera.
> surprised
{A} found a worm in the salad {he} was eating.
> disgusted

= team feel
{A} put on a wet sweater on a windy day.
> chilly
{A} read a mystery and badly wanted to know who the thief was.
> curious
{A} had not eaten anything since yesterday morning.
> hungry
{A} saw the enemy team break every rule and still win.
> angry

= hospital feel
{A} waited in the hospital while {his} little son had an operation.
> worried
{A} was told that the long-awaited trip to the islands starts tomorrow.
> excited
{A} looked at old pictures of {his} school days.
> nostalgic
{A} tried the same broken zipper for the tenth time.
> frustrated

= neighbor other
{A} brought soup to {B}, who was sick in bed.
> cared for
{A} laughed loudly at the poem {B} had written.
> hurt
{A} jumped out from behind a door right in front of {B}.
> startled
{A} talked about stamps for two hours while {B} looked at the clock.
> bored

= praise other
{A} told the class that {B} had made the best drawing.
> flattered
{A} borrowed a bicycle from {B} and brought it back broken.
> upset
{A} gave {B} directions that made no sense at all.
> puzzled
{A} walked {B} around the whole city for nine hours.
> tired

= rescue other
{A} pulled {B} out of the icy lake.
> thankful
{A} read the diary of {B} without asking.
> invaded
{A} let {B} drive for sixteen hours without a break.
> sleepy
{A} ate the whole cake while {B} got none.
> left out

= trick other
{A} did a card trick, and {B} had no idea how it worked.
> amazed
{A} drove much too fast while {B} sat in the passenger seat.
> afraid
{A} forgot the birthday of {B}, {his} best friend.
> neglected
{A} made {B} carry a box of books up to the tenth floor.
> out of breath

= alarms why
{A} set three alarms before going to bed.
> be up for an early train
{A} walked on tiptoe past the bedroom.
> let the baby sleep
{A} put sunscreen and a towel into a bag.
> spend a day at the beach
{A} wrote down a list of milk, eggs and bread.
> remember what to buy

= candles why
{A} hid behind the sofa with the lights off.
> surprise a guest at a party
{A} looked under every cushion in the house.
> find the lost keys
{A} called the landlord about a dripping ceiling.
> have a leak fixed
{A} poured a glass of cold water after the run.
> quench a thirst

= umbrella why
{A} took an umbrella and rubber boots.
> keep dry on a stormy day
{A} turned off the phone before the film began.
> avoid disturbing the audience
{A} put a coin in the street musician's hat.
> reward a good song
{A} stepped on the scale every Monday.
> keep an eye on body weight

= library why
{A} handed {B} a tissue.
> help someone who was crying
{A} raised a hand in class.
> ask the teacher a question
{A} put a bandage on {his} knee.
> cover a bleeding cut
{A} swapped seats with a small child at the theater.
> give someone a better view

= fence why
{A} painted a sign that said "Beware of the dog."
> warn visitors
{A} planted tomatoes behind the house.
> grow fresh vegetables
{A} sold the car and bought a bicycle.
> save money on gasoline
{A} practiced the same song every day for a month.
> play well at a concert

= coat why
{A} gave {his} coat to {B} on the cold walk home.
> keep a friend warm
{A} wrote a letter to the mayor about the broken bridge.
> get something repaired
{A} stayed after school with {B} and a math book.
> explain hard homework
{A} waved both arms at the passing boat.
> get the attention of the crew

= taxi why
{A} asked the waiter for the check.
> pay and leave the restaurant
{A} pressed the button beside the elevator.
> ride to another floor
{A} stopped the car beside a police officer and unfolded a map.
> get directions
{A} blew on a spoonful of soup.
> cool the food down

= box why
{A} taped the box shut and wrote an address on it.
> send a package
{A} put on goggles and thick gloves in the workshop.
> avoid an injury
{A} hung posters with a picture of a cat on every lamp post.
> find a missing pet
{A} tried on four pairs of shoes.
> get the right size

= smoke next
{A} smelled smoke and saw flames in the kitchen.
> call the fire department
{A} noticed that the milk in the glass was sour.
> pour the drink down the sink
{A} saw that the bus had already left.
> wait for the next one
{A} got a friendly letter from {B}.
> write a reply

= kick next
{A} kicked a ball through a neighbor's window by accident.
> apologize and offer to pay
{A} finished painting the bedroom and had paint on both hands.
> wash up
{A} ran out of flour in the middle of baking.
> go to the store
{A} felt a sharp toothache.
> make a dentist appointment

= wallet next
{A} found a wallet with a name and address in it.
> return it to the owner
{A} could not keep {his} eyes open at midnight.
> go to bed
{A} heard the doorbell ring.
> see who is there
{A} got soaked by the rain on the way home.
> change clothes

= rules next
{A} sat down at the table with a new board game.
> learn the rules
{A} crossed the finish line after a long race.
> drink and rest
{A} saw the needle of the fuel gauge at empty.
> look for a gas station
{A} finished dinner and saw a full sink.
> do the dishes

= exam next
{A} has an important exam tomorrow morning.
> study the notes once more
{A} found a tick on {his} dog.
> remove it carefully
{A} cut the grass and left it lying on the lawn.
> rake it up
{A} got a sweater that was far too small.
> exchange it for a larger one

= lostchild next
{A} met a lost, crying child at the fair.
> help to look for the parents
{A} saw that {B} was carrying six heavy bags.
> offer to take some
{A} was invited to the wedding of {B}.
> choose a present
{A} spilled coffee on the new carpet.
> scrub out the stain

= phone next
{A} saw that the phone was at one percent.
> plug in the charger
{A} heard that a storm would reach the coast tonight.
> close the shutters
{A} came home after two weeks away and found the plants drooping.
> water them
{A} got off the plane and walked to the moving belt.
> pick up the luggage

= argument next
{A} shouted at {B} and later saw that {he} had been wrong.
> say sorry
{A} was thanked by {B} for a lovely evening.
> reply "You are welcome"
{A} missed what {B} had said because of a passing train.
> ask for it to be repeated
{A} learned that {B} had passed the driving test.
> offer congratulations

= omelet need
{A} served a homemade omelet for breakfast.
> break some eggs
{A} mailed a postcard from Rome.
> buy a stamp
{A} drove {B} to the airport in a van.
> get a license
{A} paid for lunch in cash.
> take out a wallet

= marathon need
{A} ran the marathon in a good time.
> train for months
{A} flew a kite with {B} on the beach.
> wait for some wind
{A} built a snowman with {B}.
> put on warm gloves
{A} opened the locked front door.
> find a key

= stage need
{A} acted in the school play without a mistake.
> memorize the lines
{A} watched a film at the cinema.
> get a ticket
{A} went swimming in the lake.
> change into trunks or a swimsuit
{A} took a loaf of fresh bread out of the oven.
> knead some dough

= photo need
{A} showed {B} pictures of the trip.
> take a camera along
{A} gave {B} a scarf made at home.
> learn to knit
{A} ate a fish straight from the lake.
> cast a line
{A} harvested a basket of carrots.
> sow seeds in spring

= friend describe
{A} gives half of every paycheck to a shelter.
> generous
{A} never tells a lie, even when the truth hurts.
> honest
{A} ran into the burning house to save {B}.
> brave
{A} leaves dirty clothes all over the floor.
> messy

= worker describe
{A} stays in the office until every task is done.
> hardworking
{A} spends whole days on the couch and lets others do the chores.
> lazy
{A} can explain the same thing ten times without getting cross.
> patient
{A} makes everyone at the table laugh.
> funny

= guest describe
{A} always says "please" and "thank you."
> polite
{A} pushes to the front of every line.
> rude
{A} speaks softly and hides when strangers visit.
> shy
{A} says yes to every task and then finishes none of them.
> unreliable

= inventor describe
{A} draws, paints and invents new songs every week.
> creative
{A} checks every door twice and never takes a risk.
> careful
{A} tells everybody how great and clever {he} is.
> boastful
{A} wins every chess game and solves hard puzzles in minutes.
> smart

= runner describe
{A} failed the test five times, but studied on until {he} passed.
> determined
{A} trips over chairs and drops cups every day.
> clumsy
{A} still remembers and resents a joke from ten years ago.
> unforgiving
{A} walks into any party and talks to everyone.
> outgoing

= cat describe
{A} feeds stray cats and nurses hurt birds.
> kind to animals
{A} keeps every coin and never buys anything new.
> careful with money
{A} puts every book back in its place by color and size.
> very tidy
{A} believes every tale that {B} makes up.
> easy to fool

= baby why
{A} covered the electric outlets in the living room.
> protect a toddler
{A} put a saucer of milk on the porch.
> feed a cat
{A} bought a ring and got down on one knee.
> propose marriage
{A} learned Spanish in the evenings.
> prepare for life abroad

= ticket why
{A} whispered something to {B} and pointed at the open zipper.
> spare someone an awkward moment
{A} wore a black suit and brought white flowers.
> attend a funeral
{A} turned the music up and moved the chairs aside.
> make room for dancing
{A} wore two pairs of socks and a wool hat.
> stay warm outside

= cinema next
{A} noticed a long crack in the mirror.
> replace it
{A} walked into a dark room.
> switch on a lamp
{A} saw an old man fall on the sidewalk.
> help the person up
{A} put the last piece into the jigsaw puzzle.
> admire the finished picture

= camp next
{A} arrived at the campsite just before sunset.
> pitch the tent
{A} stepped out of the shower.
> grab a towel
{A} finished the last page of a library book.
> bring it back
{A} felt cold while sitting near an open window.
> close it

= recital feel
{A} played the piano without one mistake, and everyone clapped.
> pleased
{A} has been stuck in an elevator for three hours.
> impatient
{A} lost the watch that {his} late father had given {him}.
> heartbroken
{A} heard two experts say opposite things about the same pill.
> unsure

= snow feel
{A} stood in the snow without a coat.
> cold
{A} ran five miles under the noon sun.
> hot and sweaty
{A} rode a small boat through high waves all morning.
> seasick
{A} ate three plates of pasta and a huge dessert.
> too full

= shop other
{A} gave {B}, a total stranger, a free ticket to the concert.
> delighted
{A} blamed {B} for a mistake that {B} had not made.
> wronged
{A} pointed out in front of everyone that {B} had a hole in one sock.
> self-conscious
{A} cut a bowl of raw onions right beside {B}.
> tearful

= coach other
{A} told {B}, "You can do it," just before the race.
> encouraged
{A} broke up with {B} after five years.
> heartbroken
{A} asked {B} the same silly question forty times.
> irritated
{A} showed {B} a huge spider in a jar without a lid.
> uneasy

= chef need
{A} poured hot tea into two cups.
> boil some water
{A} wore a freshly ironed shirt.
> heat up the iron
{A} rode a horse along the river.
> put on a saddle
{A} read a bedtime story to {B}.
> pick out a book

= party need
{A} blew out the candles on the cake.
> light them
{A} unpacked three suitcases at the hotel.
> check in at the desk
{A} graduated from college with top grades.
> pass many exams
{A} hung a painting on the wall.
> hammer in a nail

= gift why
{A} wrapped a toy train in shiny paper.
> give someone a present
{A} stood on a chair in the kitchen.
> reach the top shelf
{A} held a cold pack against {his} ankle.
> bring down swelling
{A} put a bowl of apples on the table at snack time.
> offer something healthy
"""

# Four moments of one routine, each with what happens next. {S} is a person, {the} the same person
# once known ("the woman"), {he}, {him} and {his} the pronouns. The first line names the activity.
ROUTINES = """
= Baking bread
{S} pours flour, water and yeast into a bowl and stirs. {He}
> kneads the sticky dough on a floured board.
{S} sees that the dough under the towel has doubled in size. {He}
> shapes it into a loaf and slides it into the oven.
{S} hears the oven timer ring and puts on thick mitts. {He}
> lifts the hot loaf out and sets it on a rack.
{S} has a cool loaf and a bread knife on the board. {He}
> cuts a slice and spreads butter on it.

= Washing a car
{S} parks a dusty, dry car in the driveway. {He}
> rinses off the loose dust with a hose.
{S} has a wet car and a bucket of suds. {He}
> rubs the hood with a soapy sponge.
{S} has covered the whole car in white foam. {He}
> sprays it with clean water until the foam is gone.
{S} sees drops of clean water all over the shiny car. {He}
> wipes it dry with a soft cloth.

= Changing a tire
{S} hears a loud bang and feels the car wobble. {He}
> pulls over and looks at the wheels.
{S} has loosened the nuts of the flat wheel a little. {He}
> raises the car with a jack.
{S} has the car up on the jack and the nuts in one hand. {He}
> takes off the flat and puts on the spare.
{S} has put on the spare and tightened the nuts by hand. {He}
> lowers the car and drives on.

= Planting a tree
{S} carries a young tree and a shovel to an empty spot on the lawn. {He}
> digs a deep hole.
{S} has just finished digging a hole for the young tree. {He}
> sets the roots down into it.
{S} holds the young tree upright in its hole. {He}
> shovels soil around the roots.
{S} has filled in the soil around the young tree. {He}
> waters it with a full can.

= Brushing teeth
{S} walks into the bathroom with a dry, clean toothbrush. {He}
> wets it and squeezes paste onto it.
{S} holds a toothbrush with fresh paste on it. {He}
> opens wide and scrubs.
{S} has a mouth full of foam. {He}
> spits into the sink and rinses.
{S} has rinsed and put the toothbrush back. {He}
> smiles at the mirror and leaves the bathroom.

= Making tea
{S} wants tea and takes an empty kettle. {He}
> fills it at the tap and turns on the stove.
{S} hears the kettle whistle. {He}
> pours the boiling water over a tea bag.
{S} has left the bag in the cup for four minutes. {He}
> pulls it out and drops it in the trash.
{S} has a dark, steaming cup without a bag. {He}
> adds some sugar and takes a careful sip.

= Building a snowman
{S} runs into the yard after a heavy snowfall. {He}
> makes a snowball and begins to roll it.
{S} has rolled one huge ball for the base. {He}
> stacks two smaller balls on it.
{S} has stacked three balls, but the top one has no face. {He}
> pushes in two coals and a carrot.
{S} has given the snowman a face. {He}
> ties a scarf around its neck and takes a photo.

= Painting a wall
{S} moves the chairs out of the empty room and opens a can of paint. {He}
> stirs it with a stick and fills the tray.
{S} dips the roller into the full tray. {He}
> rolls the first stripe onto the wall.
{S} has covered every spot of the wall with wet paint. {He}
> cleans the roller and waits for it all to dry.
{S} touches the wall and finds it dry. {He}
> carries the chairs back in.

= Doing laundry
{S} carries a basket of dirty shirts to the basement. {He}
> stuffs them into the washing machine.
{S} has filled the washing machine and added soap. {He}
> shuts the door and presses the start button.
{S} hears the washing machine stop. {He}
> hangs the damp shirts on the line.
{S} takes the dry shirts off the line. {He}
> irons and folds them.

= Mailing a letter
{S} sits down with a blank sheet and a pen. {He}
> writes a few lines to a friend.
{S} has signed the letter to a friend. {He}
> folds it and puts it in an envelope.
{S} has sealed the envelope. {He}
> writes the address and sticks on a stamp.
{S} walks up to the mailbox with the stamped envelope. {He}
> drops it through the slot.

= Giving a dog a bath
{S} leads a muddy dog to an empty tub. {He}
> lifts it in and runs warm water.
{S} has wet the dog's fur from head to tail. {He}
> rubs in the shampoo.
{S} has a dog covered in suds. {He}
> rinses the fur until the water runs clear.
{S} has rinsed the last suds off the dog. {He}
> wraps it in a big towel.

= Fishing
{S} sits on the pier with a bare hook on the line. {He}
> takes a worm from a can for bait.
{S} has put a worm on the hook. {He}
> casts the line far out and waits.
{S} feels a strong tug on the line. {He}
> turns the reel to bring the fish in.
{S} holds a fish that is too small to keep. {He}
> unhooks it and lets it swim away.

= Playing bowling
{S} puts on bowling shoes and steps up to the rack. {He}
> picks a ball that is not too heavy.
{S} stands at the lane with the ball in hand. {He}
> swings and rolls it toward the pins.
{S} sees that two pins are still standing after the first roll. {He}
> takes a second shot at them.
{S} has knocked down every pin at the first try. {He}
> cheers over the strike.

= Lighting a campfire
{S} walks through the woods to get fuel. {He}
> gathers dry sticks.
{S} has built a small pile of sticks inside a ring of stones. {He}
> strikes a match and holds it to the pile.
{S} sees small flames licking at the sticks. {He}
> lays on a larger log.
{S} wants to go to sleep, but the campfire still glows. {He}
> pours water over the embers.

= Getting a haircut
{S} enters the barber shop and sits down in the big chair. {He}
> tells the barber how short it should be.
{S} has explained to the barber what {he} wants. {He}
> sits still while the scissors snip.
{S} sees the barber put the scissors down and bring a hand mirror. {He}
> looks at the back of {his} head.
{S} likes the new haircut and gets up from the chair. {He}
> pays the barber.

= Wrapping a present
{S} has a present and a roll of paper that is still closed. {He}
> unrolls it and cuts off a big piece.
{S} lays the present in the middle of a big piece of paper. {He}
> folds the sides over it.
{S} holds the folded paper tightly around the present. {He}
> fastens the edges with tape.
{S} has taped the paper around the present. {He}
> adds a ribbon and a name tag.

= Making pancakes
{S} has flour, eggs and milk on the counter. {He}
> beats them into a smooth batter.
{S} has a bowl of batter and a hot, buttered pan. {He}
> ladles some of it into the pan.
{S} sees bubbles on top of the pancake in the pan. {He}
> flips it to brown the other side.
{S} sees that the pancake is golden on both sides. {He}
> slides it onto a plate and pours on syrup.

= Borrowing a library book
{S} comes to the library to look for a book about whales. {He}
> searches the catalog for the right shelf.
{S} knows the number of the right shelf. {He}
> walks along the rows and pulls the book out.
{S} has found the book and goes to the front desk. {He}
> hands over the library card.
{S} has had the book for three weeks and read it all. {He}
> brings it back.

= Seeing the dentist
{S} arrives at the dentist's office for an appointment. {He}
> gives {his} name at the desk and waits.
{S} hears {his} name called in the waiting room. {He}
> follows the nurse to the chair.
{S} leans back in the chair under the bright lamp. {He}
> opens {his} mouth for the check.
{S} hears that all teeth are healthy. {He}
> gets up and goes home happy.

= Playing basketball
{S} catches the ball far away from the basket. {He}
> dribbles toward the hoop.
{S} stands open under the hoop with the ball. {He}
> jumps and shoots.
{S} sees the ball drop through the net. {He}
> raises both arms and runs back to defend.
{S} hears the final whistle of a close game. {He}
> shakes hands with the other team.

= Taking a bus
{S} waits at the stop and sees the bus come near. {He}
> raises a hand so that the driver stops.
{S} sees the doors of the bus open at the stop. {He}
> steps aboard and shows a pass.
{S} has shown a pass to the bus driver. {He}
> finds a free seat.
{S} sits on the bus and sees that {his} stop is next. {He}
> pushes the red button.

= Making a sandwich
{S} takes two slices of bread out of the bag. {He}
> lays them on a plate.
{S} has two plain slices of bread on a plate. {He}
> spreads mustard on both.
{S} has spread mustard on both slices, but the sandwich is empty. {He}
> puts ham and lettuce between them.
{S} has a finished ham sandwich on the plate. {He}
> takes a big bite.

= Climbing a rock wall
{S} arrives at the climbing gym in street clothes. {He}
> changes and steps into a harness.
{S} wears a harness that is not tied to anything. {He}
> fastens the rope to it.
{S} is tied to the rope at the foot of the wall. {He}
> grabs the first hold and starts up.
{S} touches the bell at the very top of the wall. {He}
> is let down slowly on the rope.

= Grooming a horse
{S} leads the dusty horse out of its stall. {He}
> ties it to a post.
{S} has tied the dusty horse to a post. {He}
> brushes the dirt out of its coat.
{S} has a clean horse and wants to ride. {He}
> puts a saddle on its back.
{S} has saddled the horse and tightened the strap. {He}
> swings one leg over and rides off.

= Sewing on a button
{S} sees that a shirt has lost a button. {He}
> gets a needle from the sewing box.
{S} holds a needle without any thread. {He}
> pulls a thread through the eye.
{S} has a threaded needle, a shirt and a loose button. {He}
> stitches through the holes several times.
{S} has stitched the button on firmly. {He}
> ties a knot and snips the thread.

= Flying a kite
{S} unpacks a kite that lies in pieces. {He}
> fits the sticks and the cloth together.
{S} has put the kite together in a windy field. {He}
> runs until the wind lifts it.
{S} feels the wind pull the kite strongly upward. {He}
> lets out more string.
{S} wants to go home while the kite is high in the sky. {He}
> winds in the string.

= Shopping for groceries
{S} enters the supermarket with a shopping list. {He}
> takes a cart.
{S} pushes an empty cart to the fruit stand. {He}
> picks out some apples.
{S} has everything on the list in the cart. {He}
> stands in line at the cash register.
{S} sees the total on the display of the cash register. {He}
> gets out money and pays.

= Carving a pumpkin
{S} brings a whole pumpkin into the kitchen. {He}
> cuts a lid off the top.
{S} has opened the pumpkin and sees the wet seeds. {He}
> scoops out the inside.
{S} has an empty pumpkin without a face. {He}
> carves two eyes and a grin.
{S} has carved a grinning face. {He}
> puts a lit candle inside.

= Doing the dishes
{S} stands before a pile of dirty plates and an empty sink. {He}
> runs hot water and adds soap.
{S} has put the plates into hot, soapy water. {He}
> scrubs off the food.
{S} has scrubbed a plate, but it is covered in suds. {He}
> holds it under the clear tap.
{S} has wet, clean plates in the rack. {He}
> dries them and puts them in the cupboard.

= Skiing
{S} stands in the snow beside the skis. {He}
> clicks both boots into the bindings.
{S} has the skis on at the bottom of the mountain. {He}
> takes the lift to the top.
{S} gets off the lift at the top of the slope. {He}
> glides downhill in wide turns.
{S} is going downhill and sees a fallen skier just ahead. {He}
> swerves and brakes hard.

= Making a phone call
{S} wants to reach a friend and takes out a phone. {He}
> searches for the number.
{S} has found the friend's number in the phone. {He}
> dials and listens to it ring.
{S} hears the friend pick up. {He}
> says hello.
{S} has said everything and the friend has said goodbye. {He}
> hangs up.

= Bathing a baby
{S} fills a small tub with water. {He}
> tests with an elbow that it is not too hot.
{S} has found that the bath water is just right. {He}
> lowers the baby in with both hands.
{S} holds the baby in the warm water. {He}
> washes its tiny arms with a soft cloth.
{S} lifts the dripping baby out of the water. {He}
> dries it and puts on a diaper.

= Swimming in a pool
{S} comes out of the changing room and walks to the pool. {He}
> takes a quick shower first.
{S} stands at the edge of the deep end. {He}
> dives in head first.
{S} comes up to the surface after a dive. {He}
> takes a breath and swims a lap.
{S} climbs out of the pool, dripping and cold. {He}
> wraps a towel around {his} shoulders.

= Fixing a flat bicycle tire
{S} finds a nail in the flat bicycle tire. {He}
> takes the wheel off and pulls out the tube.
{S} holds the bare tube and cannot see the hole. {He}
> dips it in water and looks for bubbles.
{S} has found and dried the spot with the hole. {He}
> glues a patch on it.
{S} has patched the tube and put the wheel back on. {He}
> pumps the tire up.

= Making soup
{S} brings carrots and potatoes home from the market. {He}
> washes off the dirt.
{S} has washed carrots and potatoes on the board. {He}
> peels and chops them.
{S} has a bowl of chopped carrots and a pot of boiling water. {He}
> tips them in and puts on the lid.
{S} lifts the lid and finds the vegetables soft. {He}
> ladles the soup into bowls.

= Watching a movie at home
{S} wants to see a movie and sits down in front of a dark screen. {He}
> turns it on with the remote.
{S} has turned on the screen and sees a list of films. {He}
> picks a comedy.
{S} is watching the film when the phone rings. {He}
> presses pause.
{S} sees the names of the actors roll by at the end. {He}
> switches everything off.

= Putting up a tent
{S} reaches the campsite with a packed tent. {He}
> looks for flat ground.
{S} has found flat ground and unrolled the tent. {He}
> slides the poles through the sleeves.
{S} has raised the tent on its poles, but wind makes it slip. {He}
> hammers pegs into the soil.
{S} has pegged the tent down firmly. {He}
> spreads a sleeping bag inside.

= Taking a photo
{S} asks the family to stand together in front of the house. {He}
> gets the camera out of its case.
{S} lifts the camera and sees only black. {He}
> removes the cap from the lens.
{S} sees that everyone is in the frame and smiling. {He}
> presses the button.
{S} has taken the photo. {He}
> shows it to the family on the small display.

= Mowing the lawn
{S} sees toys lying in the tall grass. {He}
> clears them away.
{S} has cleared the lawn, but the mower has no fuel. {He}
> fills up the tank.
{S} has a mower with a full tank on the tall grass. {He}
> starts the motor and pushes.
{S} has cut all the grass and turned off the motor. {He}
> rolls the mower back into the shed.

= Ice skating
{S} comes to the rink without skates. {He}
> rents a pair at the counter.
{S} sits on a bench with the rented skates. {He}
> pulls them on and ties the laces.
{S} steps onto the ice for the first time in {his} life. {He}
> holds on to the rail with both hands.
{S} slips and lands on the ice. {He}
> gets back up and brushes off the frost.

= Visiting a museum
{S} walks up the steps of the museum. {He}
> buys a ticket at the entrance.
{S} has a ticket, but wears a large wet coat. {He}
> leaves it at the cloakroom.
{S} enters the first hall of the museum. {He}
> looks at the paintings one by one.
{S} hears that the museum will close in five minutes. {He}
> walks to the exit.

= Playing hide and seek
{S} is chosen to be the seeker. {He}
> covers {his} eyes and starts to count.
{S} has counted to fifty. {He}
> calls "Ready or not, here I come!"
{S} has been searching and sees two feet under the curtain. {He}
> pulls it aside and shouts, "Found you!"
{S} has found all the players. {He}
> lets someone else be the seeker.

= Recycling bottles
{S} has a kitchen full of sticky, empty bottles. {He}
> rinses them and puts them in a bag.
{S} has filled a bag with empty bottles. {He}
> carries it to the recycling bins.
{S} stands before bins for green, brown and clear glass. {He}
> sorts the bottles by color.
{S} has thrown in the last bottle. {He}
> folds up the empty bag.

= Shoveling snow
{S} looks out and sees that snow has blocked the path. {He}
> puts on boots and a coat.
{S} is dressed warmly, but has nothing to dig with. {He}
> fetches a shovel from the garage.
{S} stands on the snowy path with a shovel. {He}
> throws the snow to the side.
{S} has cleared the path, but it is icy. {He}
> scatters salt on it.

= Giving a speech
{S} hears the host call {him} to the stage. {He}
> stands up and walks to the microphone.
{S} stands at the microphone in front of a quiet crowd. {He}
> greets the audience and begins.
{S} is speaking and forgets the next point. {He}
> glances at a note card.
{S} has said the last sentence of the speech. {He}
> bows while people clap.

= Hanging a picture
{S} wants to hang a picture on a bare wall. {He}
> marks a spot with a pencil.
{S} has marked a spot for the nail. {He}
> drives it in with a hammer.
{S} has a nail in the wall. {He}
> hooks the wire of the frame over it.
{S} sees that the picture hangs at an angle. {He}
> nudges one corner until it is straight.

= Making lemonade
{S} has a bag of whole lemons. {He}
> cuts them in half.
{S} has a bowl of lemon halves. {He}
> squeezes the juice into a jug.
{S} tastes the juice in the jug and makes a sour face. {He}
> stirs in water and plenty of sugar.
{S} finds that the lemonade tastes right but is warm. {He}
> drops in some ice cubes.

= Feeding a cat
{S} hears the hungry cat meow by its empty bowl. {He}
> takes a can from the cupboard.
{S} holds a closed can of cat food. {He}
> pulls the tab to open it.
{S} has an open can and an empty bowl. {He}
> spoons the food out.
{S} has filled the cat's bowl with food. {He}
> sets it down on the floor.

= Renting a rowboat
{S} comes to the lake and sees boats for rent. {He}
> pays the man at the dock for an hour.
{S} climbs into the boat, which is still tied to the dock. {He}
> unties the rope and pushes off.
{S} drifts on the lake with both oars in hand. {He}
> rows toward the island.
{S} comes back to the dock when the hour is over. {He}
> ties the boat up and gets out.

= Going through airport security
{S} joins the line at security with a bag. {He}
> gets out a passport and a boarding pass.
{S} has shown a passport and reaches the scanner. {He}
> lays the bag and the coat in a tray.
{S} sees the tray go into the machine. {He}
> walks through the metal detector.
{S} has passed the detector without a beep. {He}
> collects the bag and heads for the gate.

= Making popcorn
{S} wants popcorn and has a cold, empty pot. {He}
> heats a little oil in it.
{S} has a pot with hot oil. {He}
> adds the kernels and covers it.
{S} hears that the popping has stopped. {He}
> takes the pot off the stove.
{S} has a bowl of plain, hot popcorn. {He}
> sprinkles salt on it.

= Putting a child to bed
{S} sees the child yawn in front of the toys. {He}
> says that it is time to tidy up.
{S} has a child in day clothes who has tidied up. {He}
> helps with the pajamas.
{S} tucks in the child, who asks for a story. {He}
> opens a picture book.
{S} has read the story, and the child is asleep. {He}
> turns off the lamp and tiptoes out.

= Voting
{S} enters the hall on election day. {He}
> shows an identity card to a helper.
{S} has shown an identity card and gets a ballot. {He}
> goes into the booth alone.
{S} stands in the booth with an empty ballot. {He}
> marks a name with a cross.
{S} comes out of the booth with a folded ballot. {He}
> drops it in the box.

= Donating clothes
{S} finds that the closet is too full. {He}
> takes out what no longer fits.
{S} has a pile of clothes that no longer fit. {He}
> packs them in a bag.
{S} has a packed bag of clothes by the door. {He}
> drives it to the charity shop.
{S} hands the bag to the clerk at the charity shop. {He}
> gets a thank-you and leaves.

= Riding a roller coaster
{S} sees a long line of people at the roller coaster. {He}
> joins it at the end.
{S} gets to the front of the line as the train stops. {He}
> takes a seat and pulls down the bar.
{S} feels the train tip over the highest point. {He}
> screams on the way down.
{S} feels the train roll back into the station and stop. {He}
> lifts the bar and gets off.

= Treating a cut
{S} cuts a finger while slicing onions. {He}
> puts down the knife.
{S} has put down the knife and sees dirt in the cut. {He}
> washes it under the tap.
{S} has washed the cut, but it still bleeds. {He}
> presses a clean cloth on it.
{S} sees that the bleeding has stopped. {He}
> sticks a bandage over it.
"""
